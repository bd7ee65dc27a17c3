"""Processes of a command: those that torchrun started, new ones, and the signals that stop them.

Imports no torch, since commands check their options before they wait for it.
"""

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
from dataclasses import dataclass
from multiprocessing import resource_tracker
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

DEFAULT_WORKERS = 2

# -- torchrun --


def world_size() -> int:
    """Return the number of processes that share the run; 1 where nothing launched them."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """Return the number of this process among all; a lone ``RANK`` is left over from something else."""
    return int(os.environ.get("RANK") or 0) if world_size() > 1 else 0


def local_rank() -> int:
    """Return the number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK") or 0) if world_size() > 1 else 0


# -- new processes --


def in_new_process(module: str, function: str, job: object) -> Any:
    """Call a function in a new process; it reads ``job`` as JSON from stdin and prints a line of JSON."""
    # The search path is the caller's: `-c` alone would put the working directory first.
    code = f"import sys; sys.path[:] = sys.argv[1:]; from {module} import {function} as run; run()"
    command = [sys.executable, "-c", code, *sys.path]
    try:
        child = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=True)
        return json.loads(child.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def worker_count(asked: int | None) -> int:
    """Return ``asked``; if that is None, :data:`DEFAULT_WORKERS`, or the number of CPUs if that is less."""
    # On a cluster, a process may use fewer CPUs than the machine has.
    has = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(DEFAULT_WORKERS, has) if asked is None else asked


# -- signals --

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Sent by Ctrl-C and by schedulers."""


@dataclass
class StopRequest:
    """Whether a signal asked to stop."""

    asked: bool = False
    answered: bool = False
    """Whether the log says that this takes a while."""


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Make the first signal inside the block only set ``asked``; a second one has its usual effect.

    Outside the main thread, where Python delivers no signals, nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        # No exception here: it could come amid a write, or an exchange that other processes wait for.
        request.asked = True
        restore()

    for number in STOP_SIGNALS:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        restore()


def start_reading(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate over ``loader``, whose processes outlive signals from the moment they start.

    Until a process calls its ``worker_init_fn``, :func:`ignore_signals`, a signal would end it, and the run.
    """
    method = multiprocessing.get_start_method() if loader.num_workers else None
    # A fork server would hand the mask to all processes that it ever starts; Windows has no masks.
    if method not in ("fork", "spawn") or not hasattr(signal, "pthread_sigmask"):
        return iter(loader)
    if method == "spawn":
        resource_tracker.ensure_running()  # it unblocks the signals when it starts, with the first process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        # Inside "try", because a signal that came just before may raise here, with the mask set already.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(worker: int) -> None:
    """Make a process that reads images ignore signals; a ``worker_init_fn`` for ``DataLoader``.

    Ctrl-C, and many schedulers, signal all processes of a group: the main one still needs images for what it
    finishes first. When that ends, torch ends the others.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _kill_readers() -> None:
    # At its end Python sends SIGTERM, which readers ignore, and would wait for ever for one that still reads.
    readers = [child for child in multiprocessing.active_children() if child.daemon]
    if readers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise in this process
    for child in readers:
        child.kill()
