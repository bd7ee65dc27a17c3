"""Change the code at random places, one at a time, and see whether the tests notice.

    python tests/tools/mutate.py linalg surgery --sample 60 --seed 0 --out mutants.jsonl

Of every package it draws functions, each as likely as it is long, and a change in each: an operator, a
comparison, a number, a condition, the order of arguments, a transpose, a value that is returned. It does not
touch messages, log lines, annotations, assertions or module constants. One run of the test files that name
the package shows which tests enter which function; those are run on each of its mutants, in a fork that need
import nothing anew, those of few functions first, until one fails. Processes that tests start themselves run
unchanged code.

A mutant is killed if a test fails, timed out if the tests take far longer than without it, and survives
otherwise: either it changes no result, or a test is missing.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import fvcore.nn  # noqa: F401 - imported before anything forks
import hypothesis
import pytest
import timm  # noqa: F401
import torch
from mutations import Function, changes

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Mutant:
    """One change, and what became of it."""

    package: str
    file: str
    function: str
    number: int
    """Of the changes of its file."""
    line: int
    before: str
    after: str
    state: str = ""
    tests: int = 0
    by: str = ""
    """The test that failed."""

    @property
    def name(self) -> str:
        return f"{self.file}:{self.function}"


def sources(package: str) -> Iterator[Path]:
    """Return the modules of a package."""
    return iter(sorted((ROOT / "mhacut" / package).rglob("*.py")))


def draw(package: str, sample: int, seed: int) -> list[Mutant]:
    """Draw mutants of a package: functions by their length, a change in each at random."""
    generator = random.Random(f"{package} {seed}")
    functions: dict[str, list[Mutant]] = defaultdict(list)
    lines: dict[str, int] = {}
    for path in sources(package):
        file, tree = str(path.relative_to(ROOT)), ast.parse(path.read_text())
        for number, change in enumerate(changes(tree)):
            mutant = Mutant(package, file, change.function, number, change.line, change.before, change.after)
            functions[mutant.name].append(mutant)
        for node in ast.walk(tree):
            if isinstance(node, Function) and hasattr(node, "qualified"):
                lines[f"{file}:{node.qualified}"] = node.end_lineno - node.lineno + 1  # type: ignore
    drawn: list[Mutant] = []
    while functions and len(drawn) < sample:
        names = list(functions)
        (name,) = generator.choices(names, [lines[name] for name in names])
        drawn.append(functions[name].pop(generator.randrange(len(functions[name]))))
        if not functions[name]:
            del functions[name]
    return drawn


def mutated(source: str, number: int) -> ast.Module:
    """Return a module with one of its changes."""
    tree = ast.parse(source)
    next(change for place, change in enumerate(changes(tree)) if place == number).make()
    return ast.fix_missing_locations(tree)


def patch(mutant: Mutant) -> None:
    """Give the function of the imported module the code and the defaults of the mutant."""
    module = importlib.import_module(
        mutant.file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    )
    changed = types.ModuleType(module.__name__)
    changed.__dict__.update(__file__=module.__file__, __package__=module.__package__)
    tree = mutated((ROOT / mutant.file).read_text(), mutant.number)
    exec(compile(tree, mutant.file, "exec"), changed.__dict__)
    here, there = function_of(module, mutant.function), function_of(changed, mutant.function)
    here.__code__ = there.__code__
    here.__defaults__, here.__kwdefaults__ = there.__defaults__, there.__kwdefaults__


def function_of(module: types.ModuleType, name: str) -> types.FunctionType:
    """Return a function of a module, whatever decorates it."""
    found: Any = module
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    while not isinstance(found, types.FunctionType) or hasattr(found, "__wrapped__"):
        inner = (getattr(found, each, None) for each in ("__wrapped__", "__func__", "fget", "func"))
        found = next(each for each in inner if each is not None)
    return found


class Recorder:
    """Pytest plugin: the functions that each test enters, also by its fixtures, and its CPU time."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.names: dict[types.CodeType, str] = {}
        self.stack: list[set[str]] = [set()]
        self.of_fixtures: dict[str, set[str]] = {}
        sys.setprofile(self._called)
        threading.setprofile(self._called)

    def _called(self, frame: types.FrameType, event: str, _: object) -> None:
        if event == "call":
            code = frame.f_code
            name = self.names.get(code)
            if name is None:
                name = self.names[code] = _name(code)
            if name:
                self.stack[-1].add(name)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.stack.append(set())
        began, answer = time.process_time(), (yield)
        known = item._fixtureinfo.name2fixturedefs
        used = [
            self.of_fixtures.get(_key(known[name][-1]), set()) for name in item.fixturenames if name in known
        ]
        functions = sorted(self.stack.pop().union(*used))
        seconds = time.process_time() - began
        self.out.write(json.dumps({"test": item.nodeid, "seconds": seconds, "functions": functions}) + "\n")
        self.out.flush()
        return answer

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        if fixturedef.scope == "function":
            return (yield)
        self.stack.append(set())
        try:
            return (yield)
        finally:
            self.of_fixtures[_key(fixturedef)] = self.stack.pop()

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.out.write(json.dumps({"failed": report.nodeid, "why": str(report.longrepr)[-500:]}) + "\n")


def _name(code: types.CodeType) -> str:
    """Return the file and the outermost function of code of mhacut, nothing of other code."""
    path = Path(code.co_filename)
    if not path.is_relative_to(ROOT / "mhacut"):
        return ""
    return f"{path.relative_to(ROOT)}:{code.co_qualname.split('.<locals>')[0]}"


def _key(fixture: Any) -> str:
    return f"{fixture.baseid} {fixture.argname}"


class Stop:
    """Pytest plugin: name the first test that fails, and end."""

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.out.write(report.nodeid)
            self.out.flush()
            os._exit(1)


def in_fork(action: Callable[[], None], seconds: float) -> int | None:
    """Return the exit code of a fork that acts, None if it took more CPU time, or 20 times as long."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 3))
            action()
            code = 0
        finally:
            os._exit(code)
    until = time.monotonic() + 20 * seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return None if code in (-signal.SIGXCPU, -signal.SIGKILL) else code
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


class Trial:
    """Pytest plugin: instead of the tests, try mutants with them."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.mutants = {name: draw(name, options.sample, options.seed) for name in options.packages}
        self.session: pytest.Session

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.session = session
        entered = self.record()
        breadth = Counter(test for tests in entered.values() for test in tests)
        for package, mutants in self.mutants.items():
            states: Counter[str] = Counter()
            for mutant in mutants:
                tests = entered.get(mutant.name, {})
                self.try_one(mutant, tests, choose(tests, breadth, self.options.seconds))
                states[mutant.state] += 1
                with self.options.out.open("a") as out:
                    out.write(json.dumps(asdict(mutant)) + "\n")
            report = {"package": package, "seed": self.options.seed, **states}
            print(json.dumps(report), file=sys.__stderr__, flush=True)
        return True

    def record(self) -> dict[str, dict[str, float]]:
        """Return the tests that enter each function, with their CPU time."""
        kept = self.options.map or self.folder / "entered.jsonl"
        known = kept.read_text() if kept.exists() else ""
        left = [item for item in self.session.items if json.dumps(item.nodeid) not in known]
        with kept.open("a") as out:
            in_fork(lambda: self.run(left, Recorder(out)), 3600)
        entered: dict[str, dict[str, float]] = defaultdict(dict)
        lines = [json.loads(line) for line in kept.read_text().splitlines()]
        failed = {line["failed"] for line in lines if "failed" in line}
        here = {item.nodeid for item in self.session.items} - failed
        for line in lines:
            if line.get("test") in here:
                for name in line["functions"]:
                    entered[name][line["test"]] = line["seconds"]
        if failed:
            print("failed without a mutant, left out:", *sorted(failed), file=sys.__stderr__, flush=True)
        return entered

    def run(self, items: Sequence[pytest.Item], plugin: object) -> None:
        """Run tests, in a fork, with temporary folders of their own."""
        self.session.config.pluginmanager.register(plugin)
        self.session.config._tmp_path_factory._given_basetemp = self.folder / str(os.getpid())
        for item, after in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)

    def try_one(self, mutant: Mutant, tests: dict[str, float], chosen: Sequence[str]) -> None:
        """Run the tests on a mutant and note what became of it."""
        mutant.tests = len(chosen)
        if not chosen:
            mutant.state = "not covered"
            return
        places = {test: place for place, test in enumerate(chosen)}
        items = [item for item in self.session.items if item.nodeid in places]
        items.sort(key=lambda item: places[item.nodeid])
        failed = self.folder / "failed"

        def act() -> None:
            with failed.open("w") as out:
                try:
                    patch(mutant)
                except Exception as error:
                    out.write(repr(error))
                    raise
                self.run(items, Stop(out))

        failed.write_text("")
        code = in_fork(act, 3 * sum(tests[test] for test in chosen) + 20)
        mutant.state = "timed out" if code is None else "killed" if code else "survived"
        mutant.by = failed.read_text()


def choose(tests: dict[str, float], breadth: Counter[str], most: float) -> list[str]:
    """Return tests of ``most`` seconds in all, those that enter few functions first; files stay together."""
    chosen: list[str] = []
    left = most
    for test in sorted(tests, key=lambda test: (breadth[test] * (0.05 + tests[test]), test)):
        if tests[test] <= left or not chosen:
            chosen.append(test)
            left -= tests[test]
    files = list(dict.fromkeys(test.split("::")[0] for test in chosen))
    return sorted(chosen, key=lambda test: files.index(test.split("::")[0]))


def tests_of(packages: Sequence[str]) -> list[str]:
    """Return the test files that name one of the packages."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    names = [f"mhacut.{package}" for package in packages]
    return [str(path.relative_to(ROOT)) for path in paths if any(name in path.read_text() for name in names)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Try mutants of every package; print a line of JSON for each package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("packages", nargs="+", help="linalg, surgery, pruning, checkpoint, ...")
    parser.add_argument("--sample", type=int, default=60, help="mutants of each package")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=30, help="CPU time of the tests per mutant, at most")
    parser.add_argument("--tests", nargs="*", help="test files; those that name a package if left out")
    parser.add_argument("--again", type=Path, help="results of an earlier run: try only what was not killed")
    parser.add_argument("--map", type=Path, help="file that keeps which tests enter which function")
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"), help="a line per mutant is added")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    hypothesis.settings.register_profile("mutate", derandomize=True, database=None)
    hypothesis.settings.load_profile("mutate")
    for place in ("out", "map"):
        if getattr(options, place):
            setattr(options, place, getattr(options, place).absolute())
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(options, Path(folder))
        if options.again:
            lines = [json.loads(line) for line in options.again.read_text().splitlines()]
            left = {(line["file"], line["number"]) for line in lines if line["state"] != "killed"}
            for mutants in trial.mutants.values():
                mutants[:] = [mutant for mutant in mutants if (mutant.file, mutant.number) in left]
        os.chdir(ROOT)
        sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
        how = ["-q", "--no-header", "-p", "no:cacheprovider", "-n", "0", "-o", "addopts="]
        how += ["-m", "not slow and not exhaustive"]
        how += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        pytest.main([*how, *(options.tests or tests_of(options.packages))], plugins=[trial])


if __name__ == "__main__":
    main()
