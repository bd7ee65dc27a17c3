"""Streams that are full or closed, and variables that torchrun sets."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers.cli import run


@pytest.mark.parametrize(
    ("streams", "code", "said"),
    [
        pytest.param(
            ">/dev/full",
            1,
            "error: cannot write to stdout: No space left on device\n",
            marks=pytest.mark.slow,
        ),
        pytest.param("2>/dev/full", 0, "", marks=pytest.mark.exhaustive),
        pytest.param(">&-", 0, "", marks=pytest.mark.exhaustive),
        pytest.param("2>&-", 0, "", marks=pytest.mark.exhaustive),
    ],
)
def test_streams_of_a_shell(slim, streams, code, said):
    command = f"{sys.executable} -m mhacut inspect {slim} -v --shapes {streams}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.endswith(said)) == (code, True)
    assert ("FLOPs" in done.stdout) == streams.startswith("2")


@pytest.mark.slow
def test_a_lone_rank_is_ignored(slim, tmp_path):
    for rank in ("1", "x", "9" * 5000):
        result = run("inspect", slim, "-q", env={"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": None})
        assert "FLOPs" in result.stdout
    assert "no such file" in run("inspect", tmp_path / "nowhere.pth", env={"LOCAL_RANK": "1"}).stderr
    assert run("inspect", slim, env={"RANK": "1", "WORLD_SIZE": "2"}).stdout == ""
    half = run("prune", slim, "--flops", "95%", "--dry-run", env={"WORLD_SIZE": "2", "RANK": None})
    assert half.exit_code == 2
    assert "RANK expected, but not set. torchrun sets this variable" in half.stderr
