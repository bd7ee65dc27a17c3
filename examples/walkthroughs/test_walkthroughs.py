"""The walk-throughs run as they stand."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from helpers.shell import mhacut_in_path

SCRIPTS = Path(__file__).parent
ENDS = {
    "vit_to_onnx_runtime": "of 300 digits right",
    "ablation": "paper-no-similarity",
    "flatten": "a new head of 3 classes (2, 3)",
}


def test_each_is_in_the_table():
    assert {path.stem for path in SCRIPTS.glob("*.sh")} == set(ENDS)
    readme = (SCRIPTS / "README.md").read_text()
    assert all(f"`{name}.sh" in readme for name in ENDS)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ENDS)
def test_it_runs(name, programs, tmp_path):
    with mhacut_in_path(programs, tmp_path) as path:
        ran = subprocess.run(
            ["bash", SCRIPTS / f"{name}.sh", tmp_path / "out"],
            env={**os.environ, "PATH": path, "SEEDS": "1", "METHODS": "full paper-no-similarity"},
            capture_output=True,
            text=True,
        )
    assert ran.returncode == 0, ran.stderr
    assert ENDS[name] in ran.stdout
    if name == "vit_to_onnx_runtime":
        right = next(line for line in ran.stdout.splitlines() if ENDS[name] in line)
        assert int(right.split()[0]) >= 285
