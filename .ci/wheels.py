"""Install the wheel and the sdist in clean environments, and run the README's main command there.

    python .ci/wheels.py --python python3.10 --python python3.13

Both are built from the files that git knows. For each Python, the wheel is installed into an environment of
its own, in a temporary folder, with no source of mhacut around; the command runs on a copy of the example's
model and images. Its table, the file it writes, what Python reads of that file and the place that ``mhacut``
is imported from are checked. With ``--sdist`` the same is done with the sdist, with ``--tests`` the fast
tests of the sdist are run, without its package, so that what they test is the wheel. Prints a line of JSON
for each environment, which is then removed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CLEAN = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
README = (ROOT / "README.md").read_text()
CHECK = """
import json, sys, mhacut, timm, torch
model = mhacut.load_model(sys.argv[1])
report = {
    "file": mhacut.__file__, "python": sys.version.split()[0], "torch": torch.__version__,
    "timm": timm.__version__, "parameters": sum(p.numel() for p in model.parameters()),
}
print(json.dumps(report))
"""
POINTS = 1.0
"""Difference of accuracy from the README's, in points, that another torch may bring."""


def main() -> None:
    """Build, and try each Python."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--python", action="append", help="interpreter, may be repeated (default: this one)")
    parser.add_argument("--sdist", action="store_true", help="install the sdist, too")
    parser.add_argument("--tests", nargs="*", metavar="FILE", help="run these tests; without names, all")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mhacut-wheels-") as folder:
        work = Path(folder)
        wheel, sdist = build(work)
        for python in arguments.python or [sys.executable]:
            for package in (wheel, sdist) if arguments.sdist else (wheel,):
                tests = arguments.tests if package is wheel else None
                with_sources = sdist if tests is not None else None
                try_package(python, package, with_sources, tests, work)


def build(work: Path) -> tuple[Path, Path]:
    """Return the wheel, and the sdist that it is built from, of the files that git knows."""
    source = work / "source"
    for name in git_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    output([sys.executable, "-m", "build", "-q", "--outdir", work / "dist", source], work)
    shutil.rmtree(source)
    return next((work / "dist").glob("*.whl")), next((work / "dist").glob("*.tar.gz"))


def git_files() -> Iterator[str]:
    """Yield the names of all files under version control that are there."""
    for name in output(["git", "ls-files", "-z"], ROOT).split("\0"):
        if (ROOT / name).is_file():
            yield name


def try_package(
    python: str, package: Path, sdist: Path | None, tests: Sequence[str] | None, work: Path
) -> None:
    """Install ``package``, check it, run ``tests`` of ``sdist`` if that is given; print what was seen."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        place = Path(folder)
        environment = place / "environment"
        output([python, "-m", "venv", environment], place)
        extra = "[onnx,wds]" if sdist else ""
        more = ["hypothesis", "pytest", "pytest-xdist"] if sdist else []
        began = time.perf_counter()
        output([environment / "bin/pip", "install", "-q", f"{package}{extra}", *more], place)
        installed = time.perf_counter() - began
        report = main_command(environment, place / "run")
        report |= {"package": package.name, "install, s": round(installed)}
        print(json.dumps(report), flush=True)
        if sdist is not None:
            print(run_tests(environment, sdist, tests or (), place / "sdist"), flush=True)


def main_command(environment: Path, place: Path) -> dict[str, object]:
    """Run the README's main command in ``place``; return its table and versions, all checked."""
    shutil.copytree(ROOT / "examples/digits/model", place / "examples/digits/model")
    shutil.copytree(ROOT / "examples/digits/images", place / "examples/digits/images")
    marked = README.split("<!-- main-job -->\n```bash\n")[1].split("\n```")[0]
    command = shlex.split(marked.split("&&")[-1].strip())
    assert command[0] == ".venv/bin/mhacut", command
    began = time.perf_counter()
    printed = output([environment / "bin/mhacut", *command[1:]], place)
    seconds = time.perf_counter() - began
    slim = place / "model-50pct.safetensors"
    report = json.loads(output([environment / "bin/python", "-c", CHECK, slim], place))
    imported_from = Path(report.pop("file"))
    assert imported_from.parent.parent.name == "site-packages", imported_from
    assert imported_from.is_relative_to(environment), imported_from
    here, there = rows(printed), rows(README)
    assert here["FLOPs"] == there["FLOPs"], printed
    assert here["parameters"][:2] == there["parameters"][:2], printed
    for found, expected in zip(here["top-1"], there["top-1"], strict=True):
        assert abs(float(found) - float(expected)) <= POINTS, printed
    kept = report["parameters"] / 1000
    assert f"{kept:.0f}K" == here["parameters"][1], (kept, printed)
    return report | {"top-1": here["top-1"], "FLOPs": here["FLOPs"], "command, s": round(seconds)}


def rows(text: str) -> dict[str, list[str]]:
    """Return the last three columns of the table of ``prune`` in ``text``, by the first word of their row."""
    found = re.findall(r"^ *(top-1|FLOPs|parameters)\b.* (\S+) +(\S+) +(\S+)$", text, re.MULTILINE)
    return {name: values for name, *values in found}


def run_tests(environment: Path, sdist: Path, names: Sequence[str], place: Path) -> str:
    """Run tests of the sdist against the package that is installed; return pytest's last line."""
    with tarfile.open(sdist) as archive:
        archive.extractall(place, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (root,) = place.iterdir()
    shutil.rmtree(root / "mhacut")
    return output([environment / "bin/pytest", "-n", "1", "-q", *names], root).strip().splitlines()[-1]


def output(command: Sequence[object], place: Path) -> str:
    """Run ``command`` in ``place`` without PYTHONPATH; return its standard output."""
    words = list(map(str, command))
    ran = subprocess.run(words, cwd=place, env=CLEAN, capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(f"{shlex.join(words)}: exit code {ran.returncode}\n{ran.stdout[-20_000:]}\n{ran.stderr}")
    return ran.stdout


if __name__ == "__main__":
    main()
