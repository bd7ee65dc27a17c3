"""Ctrl-C during a command's own work; :mod:`mhacut.cli.quitting` has it before and after."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mhacut.cli.quitting import quit_at_once


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C within the block, as Python does.

    A KeyboardInterrupt while Python deletes an object has no effect and is not shown.
    """
    if signal.getsignal(signal.SIGINT) is not quit_at_once:
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
        signal.signal(signal.SIGINT, quit_at_once)
        sys.unraisablehook = unraisable
