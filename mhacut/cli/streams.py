"""Streams that are closed or on a full disk: messages are dropped, a result that is lost is an error."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO, cast

from mhacut.errors import OutputError


def guard_streams() -> None:
    """Let stdout raise OutputError where it cannot be written, and stderr drop what it cannot show.

    Streams that were closed as the process began are opened: another file would get their numbers, and with
    them all that is printed. What replaces stdout refuses to be written to.
    """
    stdout = _opened(1, os.O_RDONLY) if sys.stdout is None else sys.stdout
    stderr = _opened(2, os.O_WRONLY) if sys.stderr is None else sys.stderr
    sys.stdout = cast(TextIO, Guarded(stdout, _refuse))
    sys.stderr = cast(TextIO, Guarded(stderr, _drop))


def give_up(stream: TextIO) -> None:
    """Lose what ``stream`` still holds, which Python would try to write again at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


class Guarded:
    """A stream whose failures go to ``failed``; all else is that of ``stream``."""

    def __init__(self, stream: TextIO, failed: Callable[[TextIO, OSError], None]) -> None:
        self._stream = stream
        self._failed = failed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if text == "":
            return 0  # click tries so whether it may write, and keeps the answer to itself
        try:
            self._stream.write(text)
        except OSError as error:
            self._failed(self._stream, error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(self._stream, error)


def _refuse(stream: TextIO, error: OSError) -> None:
    if isinstance(error, BrokenPipeError):  # nobody reads on (``| head``): no error
        raise error
    give_up(stream)
    why = "stdout is closed" if error.errno == errno.EBADF else error.strerror or error
    raise OutputError(f"the output cannot be written: {why}") from error


def _drop(stream: TextIO, error: OSError) -> None:
    """Do nothing: there is nowhere to say so."""


def _opened(number: int, mode: int) -> TextIO:
    null = os.open(os.devnull, mode)
    if null != number:
        os.dup2(null, number)
        os.close(null)
    return open(number, "w", closefd=False)
