"""Ctrl-C before a command works; imports next to nothing, since until then Python shows a traceback."""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

INTERRUPTED = 130
"""Exit code of a program that SIGINT ended, as shells report it."""


def quit_when_interrupted() -> None:
    """Let Ctrl-C end the process at once, without a traceback, but within ``interrupts.interruptible``.

    Where SIGINT is ignored (a shell's background job), or somebody else handles it, nothing changes.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, quit_at_once)


def quit_at_once(number: int, frame: FrameType | None) -> None:
    """Handle a signal: an exception would be caught, or printed, by whatever library is being imported."""
    os._exit(INTERRUPTED)
