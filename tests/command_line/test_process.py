"""The command as a process: help, versions, pipes, signals."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest

import mhacut
from helpers.cli import run, unchanged
from helpers.programs import MAIN
from mhacut.cli.interrupts import interruptible
from mhacut.cli.threads import wait_briefly

ASCII = """
import sys
sys.stdout = open(1, "w", encoding="ascii", errors="strict", closefd=False)
sys.stderr = open(2, "w", encoding="ascii", errors="backslashreplace", closefd=False)
"""
"""What PYTHONIOENCODING=ascii makes of them."""


def _children_cpu_s() -> float:
    """CPU seconds of all processes that ended: wall time would be that of whatever else runs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


LATE = {"torch", "timm", "yaml", "numpy", *({"rich"} if version("typer") >= "0.26" else ())}
"""Packages that help does not need; older typer imports rich for it."""


def test_help_is_fast_and_needs_no_torch():
    code = (
        "import sys; from mhacut.cli.app import app; app(['prune', '--help'], standalone_mode=False); "
        f"heavy = {LATE} & set(sys.modules); assert not heavy, heavy"
    )
    seconds = []
    for _ in range(3):
        began = _children_cpu_s()
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        seconds.append(_children_cpu_s() - began)
        assert result.returncode == 0, result.stderr
    assert "One FLOP is" in result.stdout
    assert min(seconds) < 0.7


WRONG = [
    ("prune {file} --flops 0", 2, "--flops 0 is not a budget"),
    ("prune {file} --flops -1G", 2, "--flops -1G is not a budget"),
    ("prune {file} --flops 2,0G", 2, "--flops 2,0G is not a budget"),
    ("prune {file} --flops 500%", 2, "a share is at most 100%"),
    ("prune nowhere.pth --flops 50%", 1, "no such file: nowhere.pth"),
    ("prune nowhere/ --flops 50%", 1, "no such folder: nowhere/"),
    ("prune {empty} --flops 50%", 1, "file is empty"),
    ("prune {file} --flops 50% --data-dir nowhere", 1, "nowhere: no such directory (--data-dir)"),
    ("prune {file} --flops 50% --data-dir {file}", 1, "is a file; --data-dir expects a directory"),
    ("prune {file} --flops 50% --class-map nowhere", 1, "nowhere: class map cannot be read"),
    ("prune {file} --flops 50% -o {slim}", 1, "exists already; choose another name, or --overwrite"),
    ("prune {slim} --flops 50% -o {slim} --overwrite", 1, "is the input"),
    ("prune {file} --flops 50% --report {file}/a.html", 1, "is not a directory"),
    ("prune {file} --flops 50% -o /proc/new/x.safetensors", 1, "x.safetensors: cannot be created in /proc: "),
    ("prune {file} --flops 9% -o {file} --calibration /proc/x.safetensors", 1, "cannot be created in /proc"),
    ("inspect {file} --html /proc/a.html", 1, "/proc/a.html: cannot be created in /proc: "),
    ("evaluate nowhere.pth --data-dir .", 1, "no such file: nowhere.pth"),
    ("finetune {file} --teacher nowhere.pth --data-dir .", 1, "no such file: nowhere.pth"),
    ("finetune {file} -o {slim}", 1, "is a file; expected a directory for the run (--output)"),
    ("finetune {file} -o {run}", 1, "already holds a run (args.yaml); continue it with --resume"),
    ("finetune {file} -o /proc/new/run", 1, "cannot be created in /proc: "),
    ("finetune --resume {run} --overwrite", 2, "--overwrite: would remove the run"),
    ("finetune --resume nowhere", 2, "--resume nowhere: no run to continue"),
    ("inspect {file} --compare nowhere.pth", 1, "no such file: nowhere.pth"),
    ("bench {file} nowhere.pth", 1, "no such file: nowhere.pth"),
    ("export nowhere.pth", 1, "no such file: nowhere.pth"),
]


def test_wrong_paths_and_budgets_need_no_torch(tmp_path):
    """In one process: each would take as long to start as to fail."""
    files = {name: tmp_path / f"{name}.safetensors" for name in ("file", "slim", "empty")}
    for name, file in files.items():
        file.write_text("" if name == "empty" else "x")
    files["run"] = tmp_path / "run"
    files["run"].mkdir()
    (files["run"] / "args.yaml").write_text("epochs: 2\n")
    code = (
        "import json, sys\n"
        "from mhacut.cli.app import app\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    try: app(arguments)\n"
        "    except SystemExit as error: print(error.code, file=sys.stderr)\n"
        "heavy = {'torch', 'timm', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    commands = [[word.format(**files) for word in line.split()] for line, _, _ in WRONG]
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    told = result.stderr.splitlines()
    assert len(told) == 2 * len(WRONG), result.stderr
    for said, status, (line, expected, message) in zip(told[::2], told[1::2], WRONG, strict=True):
        assert message in said, line
        assert int(status) == expected, line


def test_help_groups_flags():
    text = run("prune", "--help").stdout
    assert "(default: )" not in text
    headings = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        "Arguments:",
        "Result:",
        "Data:",
        "Model:",
        "Preprocessing:",
        "Measuring:",
        "Computing:",
        "Output:",
        "Rarer options:",
        "Research switches:",
    ]
    assert "(default: 60)" in " ".join(text.split())


def test_version():
    assert run("--version").stdout == f"mhacut {mhacut.__version__}\n"


def test_version_with_what_it_stands_on():
    for order in (["--version", "-v"], ["-v", "--version"]):
        lines = run(*order).stdout.splitlines()
        assert lines[0] == f"mhacut {mhacut.__version__}"
        assert [line.split()[0] for line in lines[1:]] == ["python", "torch", "timm", "safetensors", "device"]
        assert lines[2] == f"torch {version('torch')}"


def test_no_command_is_a_usage_error():
    result = run("-q")
    assert result.exit_code == 2
    assert result.stderr == "error: missing command; see mhacut --help\n"


@pytest.mark.parametrize(
    ("arguments", "start", "help"),
    [  # versions of click word it with and without the colon, and quotes
        (["prune", "a.pth", "--flop", "50%"], "error: no such option:? '?--flop'?[. ]", "mhacut prune"),
        (["prune", "--flops"], "error: option '--flops' requires an argument", "mhacut prune"),
        (["prune", "-b", "two"], "error: invalid value for '--batch-size' / '-b'", "mhacut prune"),
        (["pruen"], "error: no such command 'pruen'", "mhacut"),
        (["--flops"], "error: no such option:? '?--flops'?[.; ]", "mhacut"),
    ],
)
def test_what_cannot_be_parsed_takes_one_line(arguments, start, help):
    result = run(*arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert re.match(start, line)
    assert f"see {help} --help" in line


def test_no_arguments_at_all_are_answered_by_help():
    assert "Cut channels out of the attention" in run().output


@pytest.mark.slow
def test_broken_pipe_ends_quietly(programs, slim):
    with unchanged(slim):
        program = programs.start(MAIN, "inspect", slim, "-q")
        program.stdout.close()
        with program.stderr:
            assert program.stderr.read() == ""
            assert program.end() == 0


@pytest.mark.slow
def test_ascii_terminal(programs, slim, tmp_path):
    path = tmp_path / "mod\u00e8le \u6f22.safetensors"
    path.write_bytes(slim.read_bytes())
    with unchanged(path):
        done = programs.run(ASCII + MAIN, "evaluate", path, "--data-dir", "no \u6f22")
    assert done.returncode == 1
    assert r"error: no \u6f22: no such directory" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_interrupt(programs, tiny_vit, tmp_path, number):
    out = tmp_path / "out.safetensors"
    endless = ["--allocation", "indicator", "--steps", "1000000"]
    flags = ["--flops", "50%", "-o", out, *endless, "--calibration-images", "8", "-v"]
    program = programs.start(MAIN, "prune", *tiny_vit.flags, *flags)
    with program.stdout, program.stderr:
        for line in program.stderr:
            if line == "searching\n":
                break
        os.kill(program.pid, number)
        assert program.end() == 130
        stderr = program.stderr.read()
        assert program.stdout.read() == ""
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


EARLY = """
import builtins, signal
import_ = builtins.__import__

def interrupted(name, *rest, **more):
    if name == "mhacut.cli.app":
        signal.raise_signal(signal.SIGINT)
    return import_(name, *rest, **more)

builtins.__import__ = interrupted
"""
DELETED = """
from mhacut.cli.console import Console

class Interrupted:
    def __del__(self):
        {act}

Console.start = lambda self, stage: Interrupted()
"""
LATE_INTERRUPT = "import atexit, signal; atexit.register(signal.raise_signal, signal.SIGINT)\n"


@pytest.mark.parametrize(("when", "printed"), [(EARLY, False), (LATE_INTERRUPT, True)], ids=["early", "late"])
def test_interrupts_before_and_after_the_work_are_quiet(programs, when, printed):
    done = programs.run(when + MAIN, "--version")
    assert (done.returncode, done.stderr) == (130, "")
    assert bool(done.stdout) == printed


FIRST = """
import signal, sys

class Here(Exception):
    pass

def arrived(number, handler):
    raise Here

signal.signal, before = arrived, set(sys.modules)
from mhacut.cli import main
try:
    main()
except Here:
    print(*sorted(set(sys.modules) - before))
"""


def test_nothing_is_imported_before_interrupts_are_quiet():
    """Until then Ctrl-C ends in Python's own traceback."""
    result = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, check=False)
    ours = {"mhacut", "mhacut._timm_hook", "mhacut._version", "mhacut.cli", "mhacut.cli.quitting"}
    assert set(result.stdout.split()) - {"__future__"} == ours, result.stderr


def test_threads_sleep_soon_unless_the_environment_says_how_they_wait(monkeypatch):
    for given, after in (
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ):
        monkeypatch.setattr(os, "environ", dict(given))
        wait_briefly()
        assert os.environ.get("GOMP_SPINCOUNT") == after


WAITS = """
import sys
from mhacut import cli
from mhacut.cli import threads
original = threads.wait_briefly
threads.wait_briefly = lambda: (original(), print("torch" in sys.modules))
sys.argv = ["mhacut", "--version"]
cli.main()
"""


def test_how_threads_wait_is_set_before_torch_reads_it():
    result = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[0] == "False", result.stderr


@pytest.mark.slow
def test_interrupts_as_an_object_is_deleted_are_not_shown(programs, slim):
    done = programs.run(DELETED.format(act="raise KeyboardInterrupt") + MAIN, "inspect", slim, "-q")
    assert (done.returncode, done.stderr) == (0, "")
    other = programs.run(DELETED.format(act="raise ValueError") + MAIN, "inspect", slim, "-q")
    assert "Exception ignored in: <function Interrupted.__del__" in other.stderr


@pytest.mark.slow
def test_sigterm_as_an_object_is_deleted_ends_the_command(programs, slim):
    act = "import signal; del Interrupted.__del__; signal.raise_signal(signal.SIGTERM)"  # once
    wait = "import time; from mhacut.cli import inspect_text as i; i.table = lambda *_: time.sleep(60)\n"
    done = programs.run(DELETED.format(act=act) + wait + MAIN, "inspect", slim)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.endswith("interrupted; nothing was left half written\n")


def test_sigterm_is_left_alone_where_several_processes_work(monkeypatch):
    default = signal.getsignal(signal.SIGTERM)
    for size in (None, "", "1", "2"):
        if size is not None:
            monkeypatch.setenv("WORLD_SIZE", size)
        with interruptible():
            assert (signal.getsignal(signal.SIGTERM) is default) == (size == "2")
        assert signal.getsignal(signal.SIGTERM) is default
