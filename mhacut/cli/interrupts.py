"""Ctrl-C and SIGTERM during a command's own work; :mod:`mhacut.cli.quitting` has Ctrl-C before and after."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mhacut.cli.quitting import quit_at_once
from mhacut.runtime.process import world_size

if TYPE_CHECKING:
    from types import FrameType

_AGAIN_AFTER = 0.05
"""Seconds until a SIGTERM that had no effect is sent again."""


class _Ended(KeyboardInterrupt):
    """The process was sent SIGTERM."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt within the block on Ctrl-C, as Python does, and on SIGTERM, to end as tidily.

    Signals that are ignored, or that somebody else handles, stay so. Of several processes, SIGTERM ends each
    at once: one that waits for the others would not see an exception. A KeyboardInterrupt while Python
    deletes an object has no effect and is not shown; SIGTERM, which nobody sends twice, comes again.
    """
    ours: dict[signal.Signals, Any] = {signal.SIGINT: quit_at_once, signal.SIGTERM: signal.SIG_DFL}
    if world_size() > 1:
        del ours[signal.SIGTERM]
    before = {number: handler for number, handler in ours.items() if signal.getsignal(number) is handler}
    if not before or threading.current_thread() is not threading.main_thread():
        yield
        return
    unraisable = sys.unraisablehook

    def show(found: Any) -> None:
        if issubclass(found.exc_type, _Ended):
            again = threading.Timer(_AGAIN_AFTER, os.kill, (os.getpid(), signal.SIGTERM))
            again.daemon = True
            again.start()
        elif not issubclass(found.exc_type, KeyboardInterrupt):
            unraisable(found)

    try:
        sys.unraisablehook = show
        for number in before:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _end)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = unraisable


def _end(number: int, frame: FrameType | None) -> None:
    raise _Ended
