"""SIGINT and SIGTERM: work stops after the current step; processes that read images survive them."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

from mhacut.runtime.workers import warned_once

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Sent by Ctrl-C and by schedulers."""


class StopRequest:
    """Whether a signal asked to stop."""

    def __init__(self) -> None:
        self.asked = False
        self.answered = False
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
        request.asked = True
        restore()

    for number in STOP_SIGNALS:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        restore()


_PARENT_CHECK_SECONDS = 0.5
_readers: weakref.WeakSet[BaseProcess] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_readers.clear)  # they are the parent's to end


def start_reading(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate over ``loader``, whose processes outlive signals from the moment they start.

    Args:
        loader: with :func:`outlive_signals` as its ``worker_init_fn``. Until a process calls that, its
            signals wait: they would end it, and with it the run.
    """
    if not loader.num_workers:
        return iter(loader)
    with _stop_signals_blocked(), warned_once(loader.num_workers):
        iterator = iter(loader)
        _readers.update(iterator._workers)  # type: ignore[attr-defined]
    return iterator


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Block the signals in this thread and, until they unblock them, in processes that it starts."""
    method = multiprocessing.get_start_method()
    if method == "forkserver" or not hasattr(signal, "pthread_sigmask"):
        yield  # a fork server would hand the mask to all processes that it ever starts; Windows has no masks
        return
    if method == "spawn":
        resource_tracker.ensure_running()  # it unblocks the signals when it starts, with the first process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        # Inside "try", because a signal that came just before may raise here, with the mask set already.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_signals(worker: int) -> None:
    """Make a process that reads images survive signals, which may be sent to its process group.

    Ctrl-C, and many schedulers, signal the main process too, which may still need images: to it, a second
    signal that arrives while it writes a file counts as the first. When it ends, this process ends too.

    Args:
        worker: its number, from ``DataLoader``.
    """
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _end_with(parent: int) -> None:
    # torch looks only every 5 s, and never while an image is read.
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_SECONDS)
    os._exit(1)


@atexit.register
def _kill_readers() -> None:
    """Kill processes that still read when Python exits; Python would signal them and wait for ever."""
    readers = list(_readers)
    if readers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise in this process
    for process in readers:
        process.kill()
