"""Processes of a command: ranks from torchrun, new processes, and stop signals. Imports no torch."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

DEFAULT_WORKERS = 2

# -- torchrun --


def world_size() -> int:
    """Return the number of processes that torchrun started, or 1 without torchrun."""
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


# -- signals --

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Signals of Ctrl-C and of schedulers."""


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """Set an event at the first stop signal inside the block. A second signal ends the process."""
    request = threading.Event()
    # Python handles signals only in the main thread.
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        # No exception: it could interrupt a write, or an exchange that other processes wait for.
        request.set()
        restore()

    for number in STOP_SIGNALS:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        restore()


def ignore_signals(worker: int) -> None:
    """Ignore stop signals in a worker of a ``DataLoader`` (its ``worker_init_fn``).

    Ctrl-C reaches all processes of a group, but the main process still needs images to finish a step.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _kill_workers() -> None:
    # On exit, Python sends SIGTERM to the workers, which ignore it, and would wait for them forever.
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise here
    for child in workers:
        child.kill()
