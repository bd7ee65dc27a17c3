"""Ctrl-C before and after a command's own work, when nothing can be lost."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

INTERRUPTED = 130
"""Exit code of a program that SIGINT ended, as shells report it."""


def quit_when_interrupted() -> None:
    """Let Ctrl-C end the process at once, without a traceback, but within :func:`interruptible`.

    Where SIGINT is ignored (a shell's background job), or somebody else handles it, nothing changes.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _quit)


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C within the block, as Python does.

    A KeyboardInterrupt while Python deletes an object has no effect and is not shown.
    """
    if signal.getsignal(signal.SIGINT) is not _quit:
        yield
        return
    unraisable = sys.unraisablehook

    def show(found: Any) -> None:
        if not issubclass(found.exc_type, KeyboardInterrupt):
            unraisable(found)

    try:
        sys.unraisablehook = show
        signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    finally:
        signal.signal(signal.SIGINT, _quit)
        sys.unraisablehook = unraisable


def _quit(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)  # an exception would be caught, or printed, by whatever library is being imported
