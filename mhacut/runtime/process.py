"""Processes of a command: ranks from torchrun, and new processes. Imports no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

DEFAULT_WORKERS = 2

# -- torchrun --


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    # RANK without WORLD_SIZE is a leftover of another program.
    return int(os.environ.get("RANK") or 0) if world_size() > 1 else 0


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK") or 0) if world_size() > 1 else 0


# -- new processes --


def in_new_process(module: str, function: str, job: object) -> Any:
    """Call ``module.function()`` in a new process, and return its last line of output, parsed as JSON.

    The function reads ``job`` as JSON from stdin. The result is None if the process fails.
    """
    # `python -c` would put the working directory first on the search path.
    code = f"import sys; sys.path[:] = sys.argv[1:]; from {module} import {function} as run; run()"
    command = [sys.executable, "-c", code, *sys.path]
    try:
        child = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=True)
        return json.loads(child.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def worker_count(workers: int | None) -> int:
    """Return the number of processes that read images, by default 2 or the number of CPUs if smaller."""
    # On a cluster, a process may use fewer CPUs than the machine has.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(DEFAULT_WORKERS, cpus) if workers is None else workers
