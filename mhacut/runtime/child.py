"""A function of mhacut in a process of its own, which nothing else has run in."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

# The search path is the caller's: `-c` alone would put the working directory first.
_START = "import sys; sys.path[:] = sys.argv[1:]; from {0} import {1} as run; run()"


def in_new_process(module: str, function: str, job: object) -> Any:
    """Call a function in a new process; it reads ``job`` as JSON from stdin and prints a line of JSON.

    Args:
        module: of mhacut.
        function: its name; takes no arguments.
        job: anything that JSON can hold.

    Returns:
        What the last line says; None if no process can be started, or it ends without one.
    """
    if getattr(sys, "frozen", False) or not sys.executable:  # an application, which would start itself
        return None
    command = [sys.executable, "-c", _START.format(module, function), *sys.path]
    try:
        child = subprocess.run(
            command, input=json.dumps(job), capture_output=True, text=True, errors="replace", check=True
        )
        return json.loads(child.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
