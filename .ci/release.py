"""Check that a release is ready and build it; what is left is the upload, whose command is printed.

    pip install build twine
    python .ci/release.py

Every fault is listed, not the first alone. Nothing is built until there is none.
"""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACEHOLDERS = ("/OWNER/", "//127.0.0.1:8000")
"""Parts of addresses on our pages that lead nowhere until a reader puts in another."""


def main() -> None:
    """Check, build, and print how to upload; exit with 1 if something is not ready."""
    version = first(r'__version__ = "(.+)"', "mhacut/_version.py")
    faults = [*versions(version), *worktree(), *on_index(version), *links()]
    if faults:
        sys.exit("not ready:\n" + "\n".join(f"- {fault}" for fault in faults))
    dist = ROOT / "dist" / version
    python("-m", "build", "--outdir", str(dist))
    files = sorted(map(str, dist.iterdir()))
    if len(files) != 2:
        sys.exit(f"{dist}: expected a wheel and an sdist, found {len(files)} files; empty it and try again")
    python("-m", "twine", "check", "--strict", *files)
    print(f"ready; to upload:\n\n    twine upload {' '.join(files)}")


def versions(version: str) -> Iterator[str]:
    """Yield what is wrong with the version where it is stated, and with the changelog."""
    stated = first(r"^version: (.+)$", "CITATION.cff")
    if stated != version:
        yield f"CITATION.cff: version {stated}, but mhacut/_version.py has {version}"
    if not first(r"^date-released: (.+)$", "CITATION.cff"):
        yield "CITATION.cff: no date-released"
    if version not in released():
        yield f"CHANGELOG.md: no heading '## {version} (DATE)'"


def worktree() -> Iterator[str]:
    """Yield what is not committed, and notebooks that open from nowhere."""
    status = ["git", "status", "--porcelain"]
    if changed := subprocess.run(status, cwd=ROOT, capture_output=True, text=True, check=True).stdout:
        yield f"git: not committed: {', '.join(line[3:] for line in changed.splitlines())}"
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        if PLACEHOLDERS[0] in path.read_text(encoding="utf-8"):
            yield f"{path.relative_to(ROOT)}: names github.com/OWNER/mhacut, not the repository"


def on_index(version: str) -> Iterator[str]:
    """Yield whether the version is on the package index already, as pip sees it."""
    asked = [sys.executable, "-m", "pip", "index", "versions", "mhacut"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout  # nothing: a free name
    if version in re.findall(r"[^\s,]+", found.partition("Available versions:")[2].partition("\n")[0]):
        yield f"package index: has {version} already, and takes no file twice"


def links() -> Iterator[str]:
    """Yield the addresses on README and pages that do not answer."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    found = {address.rstrip(".,;:") for address in re.findall(r"https?://[^\s)>\]\"'`]+", text)}
    for address in sorted(found):
        if not any(part in f"{address}/" for part in PLACEHOLDERS):
            try:
                fetch(address, most=1)
            except OSError as error:
                yield f"{address}: {error}"


def fetch(address: str, most: int | None = None) -> str:
    """Return what is at an address, or its first ``most`` bytes."""
    request = urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0 (mhacut release check)"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.read(most).decode(errors="replace"))


def released() -> list[str]:
    """Return the versions that have a heading in the changelog."""
    return re.findall(r"^## (\S+) \(", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)


def first(pattern: str, file: str) -> str:
    """Return the first group of a pattern in a file; empty if it has none."""
    found = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    return found[1].strip("\"'") if found else ""


def python(*arguments: str) -> None:
    """Run Python in the root of the repository; exit as it does if it fails."""
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
