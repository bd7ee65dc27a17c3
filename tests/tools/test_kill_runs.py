"""The script that kills commands as they write, a few times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tests" / "tools" / "kill_runs.py"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no fork")
def test_killed_commands_leave_the_old_file_or_the_new_one():
    command = [sys.executable, SCRIPT, "--runs", "2", "--only", "inspect"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["runs"] == sum(report["files"].values()) == 2
    assert report["files"].keys() <= {"old", "new", "on the way"}
