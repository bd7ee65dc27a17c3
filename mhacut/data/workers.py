"""Processes that read images outlive a signal to their group, as the one that they read for does."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def start_reading(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate over ``loader``, whose processes are safe from signals from the moment they start.

    A signal waits until :func:`outlive_first_signal`, which must be the loader's ``worker_init_fn``, is ready
    for it: until then it would end the process, by torch's own handler, and the whole run with it.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where no signal is sent to a group
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_first_signal(worker: int) -> None:
    """Make a process that reads images outlive the signals that its group is sent.

    A terminal's Ctrl-C, and many a scheduler, reach it as well as the process it reads for, which may still
    need the images. torch ends it when it is needed no longer, with a second SIGTERM if need be.

    Args:
        worker: its number, as a ``DataLoader`` says.
    """

    def outlived(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    for number in _SIGNALS:
        signal.signal(number, outlived)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
