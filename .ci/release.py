"""Check that a release is ready and build it; what is left is the upload, whose command is printed.

    pip install build twine
    python .ci/release.py

Every fault is listed, not the first alone. Nothing is built until there is none.
"""

from __future__ import annotations

import argparse
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--index-url", help="package index; pip's without it")
    index = parser.parse_args().index_url or index_of_pip()
    version = first(r'__version__ = "(.+)"', "mhacut/_version.py")
    faults = [*versions(version), *worktree(), *on_index(index, version), *links()]
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
    if left := len([*(ROOT / "docs" / "changes").glob("+*.md")]):
        yield f"docs/changes: holds {left} changes; run towncrier build --version {version}"


def worktree() -> Iterator[str]:
    """Yield what is not committed, and notebooks that open from nowhere."""
    status = ["git", "status", "--porcelain"]
    if changed := subprocess.run(status, cwd=ROOT, capture_output=True, text=True, check=True).stdout:
        yield f"git: not committed: {', '.join(line[3:] for line in changed.splitlines())}"
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        if PLACEHOLDERS[0] in path.read_text(encoding="utf-8"):
            yield f"{path.relative_to(ROOT)}: names github.com/OWNER/mhacut, not the repository"


def on_index(index: str, version: str) -> Iterator[str]:
    """Yield whether the name is somebody else's on the package index, or the version is there already."""
    address = f"{index.rstrip('/')}/mhacut/"
    try:
        page = fetch(address)
    except OSError as error:
        if getattr(error, "code", None) != 404:  # 404: the name is free
            yield f"{address}: {error}"
        return
    there = set(re.findall(r"mhacut-(\d[\w.!+]*?)(?:-py3|\.tar\.gz)", page))
    if version in there:
        yield f"{address}: has {version} already, and an index takes no file twice"
    if strange := ", ".join(sorted(there - set(released()))):
        yield f"{address}: has {strange}, which CHANGELOG.md has not: somebody else's name?"


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


def index_of_pip() -> str:
    """Return the package index that pip is configured to use: its help names it."""
    shown = [sys.executable, "-m", "pip", "download", "--help"]
    text = subprocess.run(shown, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Base URL of the Python Package Index\s+\(default\s+(\S+)\)", text)
    return found[1] if found else ""


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
