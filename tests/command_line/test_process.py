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
from helpers.cli import research, run, unchanged
from helpers.programs import MAIN
from mhacut.cli.app import COMMANDS
from mhacut.cli.flags import RESEARCH

pytestmark = pytest.mark.slow

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


def test_help_is_fast_and_needs_no_torch():
    code = (
        "import sys; from mhacut.cli.app import app; app(['prune', '--help'], standalone_mode=False); "
        "heavy = {'torch', 'timm', 'yaml', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    seconds = []
    for _ in range(3):
        began = _children_cpu_s()
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        seconds.append(_children_cpu_s() - began)
        assert result.returncode == 0, result.stderr
    assert "--flops BUDGET" in result.stdout
    assert min(seconds) < 0.7


WRONG = [
    ("prune {file} --flops 0", 2, "--flops 0 is not a budget"),
    ("prune {file} --flops 2,0G", 2, "--flops 2,0G is not a budget"),
    ("prune {file} --flops 500%", 2, "write at most 100%"),
    ("prune nowhere.pth --flops 50%", 1, "no such file: nowhere.pth"),
    ("prune {empty} --flops 50%", 1, "file is empty"),
    ("prune {file} --flops 50% --data-dir nowhere", 1, "nowhere: no such directory (--data-dir)"),
    ("prune {file} --flops 50% --data-dir {file}", 1, "no such directory (--data-dir)"),
    ("prune {file} --flops 50% --class-map nowhere", 1, "nowhere: class map cannot be read"),
    ("prune {file} --flops 50% -o {slim}", 1, "exists already; choose another name with --output"),
    ("prune {slim} --flops 50% -o {slim} --overwrite", 1, "is the input"),
    ("prune {file} --flops 50% --report {file}/a.html", 1, "is not a directory"),
    ("evaluate nowhere.pth --data-dir .", 1, "no such file: nowhere.pth"),
    ("finetune {file} --teacher nowhere.pth --data-dir .", 1, "no such file: nowhere.pth"),
    ("finetune {file} -o {slim}", 1, "is a file; expected a folder for the run (--output)"),
    ("finetune {file} -o {run}", 1, "already holds a run (args.yaml, last.safetensors)"),
    ("finetune --resume {run} --overwrite", 2, "--overwrite: not allowed with --resume"),
    ("finetune --resume nowhere", 2, "--resume nowhere: no run to resume"),
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
    (files["run"] / "last.safetensors").write_text("x")
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


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_on_a_page(command):
    options = [one for one in COMMANDS[command].options().values() if one.panel != RESEARCH]
    text = run(command, "--help", env={"COLUMNS": "80", "TERM": "dumb"}).stdout
    assert len(text.splitlines()) <= 70
    assert "Example" in text
    assert "<" not in text  # no types of switches
    flags = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.MULTILINE))
    flags -= {"--config", "--json", "--quiet", "--verbose", "--help-all", "--help", "--set"}
    more = sum(not one.is_argument for one in options) - len(flags)
    assert not more or f"--help-all shows {more} more options." in text


def test_help_all_without_a_command_names_the_option_of_commands():
    assert '"mhacut COMMAND --help-all" shows all options' in " ".join(run("--help-all").stdout.split())


def test_version():
    (line,) = run("--version").stdout.splitlines()
    assert line.startswith(f"mhacut {mhacut.__version__} (python ")
    assert f"torch {version('torch')}, timm {version('timm')}" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "a.pth", "--flop", "50%"], "No such option"),
        (["prune", "--flops"], "'--flops' requires an argument"),
        (["prune"], "CHECKPOINT is missing"),
        (["prune", "a", "-c", "nowhere.yaml"], "error: --config nowhere.yaml: No such file"),
        (["pruen"], "No such command 'pruen'"),
        (["--flops"], "No such option"),
    ],
)
def test_what_cannot_be_parsed_is_a_usage_error(arguments, message):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_broken_pipe_ends_quietly(programs, slim):
    with unchanged(slim):
        program = programs.start(MAIN, "inspect", slim, "-q")
        program.stdout.close()
        with program.stderr:
            assert program.stderr.read() == ""
            assert program.end() == 0


def test_ascii_terminal(programs, slim, tmp_path):
    path = tmp_path / "mod\u00e8le \u6f22.safetensors"
    path.write_bytes(slim.read_bytes())
    with unchanged(path):
        done = programs.run(ASCII + MAIN, "evaluate", path, "--data-dir", "no \u6f22")
    assert done.returncode == 1
    assert r"error: no \u6f22: no such directory" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt(programs, tiny_vit, tmp_path, number):
    out = tmp_path / "out.safetensors"
    endless = research(allocation="indicator", steps=1000000)
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


WAITS = """
import os, sys
from mhacut import cli
sys.argv = ["mhacut", "--version"]
try:
    cli.main()
finally:
    print("torch" in sys.modules, os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("given", "after"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_sleep_soon_unless_the_environment_says_how_they_wait(given, after):
    """Set before torch is imported, which reads it."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    command = [sys.executable, "-c", WAITS]
    result = subprocess.run(command, env=environment | given, capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[-1] == f"False {after}", result.stderr


@pytest.mark.parametrize("size", [None, "", "1", "2"])
def test_sigterm_is_left_alone_where_several_processes_work(instead_of_prune, size):
    default, during = signal.getsignal(signal.SIGTERM), []
    instead_of_prune(lambda options: during.append(signal.getsignal(signal.SIGTERM)))
    run("prune", __file__, "--flops", "1G", env={"WORLD_SIZE": size, "RANK": "0"})
    assert (during == [default]) == (size == "2")
    assert signal.getsignal(signal.SIGTERM) is default
