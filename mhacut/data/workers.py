"""Processes that read images: a signal to their whole group does not end them before they are asked to."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What asks a process to stop: Ctrl-C, and a scheduler."""
_LOOK_EVERY = 0.5
"""Seconds."""
_started: weakref.WeakSet[Any] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_started.clear)  # the processes are the parent's to end


def start_reading(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate over ``loader``, whose processes are safe from a first signal from the moment they start.

    Args:
        loader: with :func:`outlive_first_signal` as its ``worker_init_fn``. Until a process has come that
            far a signal waits; it would end the process, and the whole run with it.
    """
    if not loader.num_workers:
        return iter(loader)
    with _signals_held():
        iterator = iter(loader)
        _started.add(iterator)
    return iterator


def outlive_first_signal(worker: int) -> None:
    """Make a process that reads images outlive the first signal, which may be meant for its group.

    A terminal's Ctrl-C, and many a scheduler, reach it as well as the process it reads for, which may still
    need the images. If that one ends instead, this one does too.

    Args:
        worker: its number, as a ``DataLoader`` says.
    """
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()

    def outlived(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    for number in STOP_SIGNALS:
        signal.signal(number, outlived)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _end_with(parent: int) -> None:
    """Look whether the parent is still there, which the signal may have ended; torch does every 5 s.

    Not from the signal on: one that comes just before a system call is not heard until that returns.
    """
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY)
    os._exit(1)


@contextmanager
def _signals_held() -> Iterator[None]:
    """In the block, signals wait, and do so in processes started there until these say otherwise."""
    method = multiprocessing.get_start_method()
    if method == "forkserver" or not hasattr(signal, "pthread_sigmask"):
        yield  # a server would pass it on to all that anybody has it start; Windows has no masks
        return
    if method == "spawn":
        resource_tracker.ensure_running()  # its start, at the first process, would let signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        # Within "try", because a signal that came just before may raise here, with all held already.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@atexit.register
def _end_reading() -> None:
    """End what still reads when Python exits, which would send it one signal and wait for ever.

    Runs before torch's and Python's own exit functions, which are older.
    """
    with ExitStack() as stack:  # which ends all, even if one fails or somebody presses Ctrl-C
        for iterator in list(_started):
            for process in iterator._workers:
                stack.callback(process.kill)
            # Nothing public ends them while somebody, a traceback maybe, holds the iterator.
            stack.callback(iterator._shutdown_workers)
