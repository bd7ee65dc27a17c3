"""Change the code at random places, one at a time, and see whether the tests notice.

    python tests/tools/mutate.py linalg tests/properties tests/pruning --sample 60 --out mutants.jsonl

Of a package it draws functions, each as likely as it is long, and a change in each: an operator, a
comparison, a number, a condition, the order of arguments, a transpose, a value that is returned. It does not
touch messages, log lines, annotations, assertions or module constants (``mutations.py`` lists the changes).
The tests run in a process of their own, on a copy of the package, until one fails.

A mutant is killed if a test fails, timed out if the tests take more than ``--seconds``, and survives
otherwise: either it changes no result, or a test is missing. Prints a line of JSON for each.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from mutations import Change, Function, changes

ROOT = Path(__file__).resolve().parents[2]


def draw(package: str, sample: int, seed: int) -> list[tuple[str, int, Change]]:
    """Draw changes of a package, each with its file and its number among the changes of that file."""
    generator = random.Random(f"{package} {seed}")
    functions: dict[str, list[tuple[str, int, Change]]] = defaultdict(list)
    lines: dict[str, int] = {}
    for path in sorted((ROOT / "mhacut" / package).rglob("*.py")):
        file, tree = str(path.relative_to(ROOT)), ast.parse(path.read_text())
        for number, change in enumerate(changes(tree)):
            functions[f"{file}:{change.function}"].append((file, number, change))
        for node in ast.walk(tree):
            if isinstance(node, Function) and hasattr(node, "qualified"):
                lines[f"{file}:{node.qualified}"] = node.end_lineno - node.lineno + 1  # type: ignore
    drawn = []
    while functions and len(drawn) < sample:
        names = list(functions)
        (name,) = generator.choices(names, [lines[name] for name in names])
        drawn.append(functions[name].pop(generator.randrange(len(functions[name]))))
        if not functions[name]:
            del functions[name]
    return drawn


def mutated(source: str, number: int) -> str:
    """Return the source of a module with one of its changes."""
    tree = ast.parse(source)
    next(change for place, change in enumerate(changes(tree)) if place == number).make()
    return ast.unparse(ast.fix_missing_locations(tree))


def state_of(folder: Path, tests: Sequence[str], seconds: float) -> tuple[str, str]:
    """Return what becomes of the package in ``folder``, and the test that failed."""
    command = [
        Path(sys.executable).with_name("pytest"),
        "-xq",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        *tests,
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "tests")])}
    try:
        ran = subprocess.run(
            [*command, "-m", "not slow and not exhaustive"],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "timed out", ""
    failed = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return ("killed" if ran.returncode else "survived"), "".join(failed[:1])


def main() -> None:
    """Try mutants of a package; print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("package", help="linalg, surgery, pruning, checkpoint, ...")
    parser.add_argument("tests", nargs="+", help="test files or folders")
    parser.add_argument("--sample", type=int, default=60, help="number of mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600, help="time of the tests per mutant, at most")
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"), help="a line per mutant is added")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shutil.copytree(ROOT / "mhacut", folder / "mhacut")
        if state_of(folder, options.tests, 10 * options.seconds)[0] != "survived":
            sys.exit("the tests fail without a mutant")
        for file, number, change in draw(options.package, options.sample, options.seed):
            source = (ROOT / file).read_text()
            (folder / file).write_text(mutated(source, number))
            state, by = state_of(folder, options.tests, options.seconds)
            (folder / file).write_text(source)
            report = {"file": file, "function": change.function, "line": change.line, "state": state}
            report |= {"before": change.before, "after": change.after, "by": by}
            print(json.dumps(report), flush=True)
            with options.out.open("a") as out:
                out.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
