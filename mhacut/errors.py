"""Errors of mhacut, and the notation of options in their messages.

A message says what happened, where, what was expected, what was found and what to do next.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class MhacutError(Exception):
    """A failure that mhacut expects: the command line shows the message without a traceback and exits 1."""


class UsageError(MhacutError):
    """An option that cannot be understood (``flops="2,0G"``) or does not fit: the command line exits 2."""


class CheckpointError(MhacutError):
    """A checkpoint that cannot be read, recognised, or trusted."""


class UnsupportedModelError(MhacutError):
    """A model with an attention class that mhacut cannot cut, or without attention."""


class PlanError(MhacutError):
    """A plan that contradicts itself or does not fit the model."""


class BudgetError(MhacutError):
    """A budget that cannot be reached, or that the model already meets."""


class DataError(MhacutError):
    """Images or labels that are missing, unreadable, or do not fit the model."""


class OutputError(MhacutError):
    """A file that cannot or must not be written."""


class Interrupted(MhacutError):
    """A run that was asked to stop and saved everything: the command line exits 130."""


class PeerFailed(MhacutError):
    """The end of this process because another process of the run failed, which reports the reason."""


OptionWriter = Callable[..., str]
"""Takes what :func:`option_name` takes."""


def option_name(name: str, *value: object) -> str:
    """Return an option, with or without a value, in the notation of whoever reads the message.

    Every message names options by this function: readers in Python see arguments, those of the command line
    flags (see :func:`options_written_by`).

    >>> option_name("round_to"), option_name("round_to", 8), option_name("labels", False)
    ('round_to', 'round_to=8', 'labels=False')
    """
    return _write(name, *value)


@contextmanager
def options_written_by(writer: OptionWriter) -> Iterator[OptionWriter]:
    """Let ``writer`` do what :func:`option_name` does, in all threads, until the block is left.

    Yields the writer of before, which ``writer`` may call.
    """
    # Global, not a context variable: what other threads say names options in the same notation.
    global _write
    before, _write = _write, writer
    try:
        yield before
    finally:
        _write = before


def _as_argument(name: str, *value: object) -> str:
    if not value:
        return name
    shown = os.fspath(value[0]) if isinstance(value[0], os.PathLike) else value[0]
    return f"{name}={shown!r}"


_write: OptionWriter = _as_argument
