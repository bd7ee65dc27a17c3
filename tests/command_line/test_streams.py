"""Streams that are full or closed, and a current directory that is gone."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest

import mhacut
from helpers.cli import run
from mhacut.cli.app import app
from mhacut.cli.streams import give_up, guard_streams

FULL = "error: the output cannot be written: No space left on device\n"


@contextmanager
def full(name):
    """One stream on a full disk; gives the other, in memory."""
    before, other = (sys.stdout, sys.stderr), io.StringIO()
    with open("/dev/full", "w") as disk:
        sys.stdout, sys.stderr = (disk, other) if name == "stdout" else (other, disk)
        try:
            guard_streams()
            yield other
            sys.stdout.flush()  # as Python does at its end
            sys.stderr.flush()
        finally:
            sys.stdout, sys.stderr = before
            give_up(disk)


def code_of(*arguments):
    with pytest.raises(SystemExit) as ended:
        app([str(argument) for argument in arguments])
    return ended.value.code


@pytest.mark.parametrize("command", ["--help", "prune --help", "--version", "inspect {slim} -q"])
def test_a_full_stdout_is_told_in_one_line(slim, command):
    with full("stdout") as stderr:
        assert code_of(*command.format(slim=slim).split()) == 1
    assert stderr.getvalue() == FULL


def test_a_full_stderr_changes_nothing_else(slim):
    with full("stderr") as stdout:
        assert code_of("pruen") == code_of("prune", slim, "--flops", "0") == 2
        assert code_of("prune", "nowhere.pth", "--flops", "50%") == 1
        assert code_of() == 2
        assert stdout.getvalue() == ""
        assert code_of("inspect", slim, "-v") == 0
    assert "FLOPs" in stdout.getvalue()


def test_streams_of_a_shell():
    def shell(streams):
        command = f"PYTHONUNBUFFERED=1 {sys.executable} -m mhacut --version {streams}"
        return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)

    done = shell(">/dev/full")
    assert (done.returncode, done.stderr) == (1, FULL)
    done = shell(">&-")
    assert (done.returncode, done.stderr) == (1, "error: the output cannot be written: stdout is closed\n")
    done = shell("2>&-")
    assert (done.returncode, done.stdout) == (0, f"mhacut {mhacut.__version__}\n")


@pytest.mark.parametrize("command", [["inspect"], ["prune", "--flops", "50%"], ["finetune"], ["export"]])
def test_a_current_directory_that_is_gone(slim, tmp_path, monkeypatch, command):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    result = run(*command, slim.absolute())
    assert result.exit_code == 1
    assert result.stderr == "error: the current directory no longer exists; change to another (cd)\n"
    assert run("--version").exit_code == 0


def test_a_lone_rank_is_ignored(slim, tmp_path):
    for rank in ("1", "x", "9" * 5000):
        result = run("inspect", slim, "-q", env={"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": None})
        assert result.exit_code == 0
        assert "FLOPs" in result.stdout
    missing = tmp_path / "nowhere.pth"
    assert "no such file" in run("inspect", missing, env={"LOCAL_RANK": "1"}).stderr
    assert run("inspect", slim, env={"RANK": "1", "WORLD_SIZE": "2"}).stdout == ""


@pytest.mark.parametrize(
    ("variables", "told"), [({}, "RANK expected, but not set"), ({"RANK": "0"}, "MASTER_ADDR expected")]
)
def test_half_of_what_torchrun_sets_is_told_in_one_line(slim, tmp_path, variables, told):
    unset = dict.fromkeys(["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
    env = {**unset, "WORLD_SIZE": "2", **variables}
    out = tmp_path / "out.safetensors"
    result = run("prune", slim, "--flops", "95%", "--device", "cpu", "-o", out, env=env)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert told in line
    assert line.endswith("; torchrun sets it, without torchrun unset WORLD_SIZE")
    assert not os.path.exists(out)
