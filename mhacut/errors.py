"""Errors of mhacut, and the spelling of options in messages."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class MhacutError(Exception):
    """Base class of expected errors. The command line prints only the message, and exits with code 1."""


class UsageError(MhacutError):
    """Error for an option with an invalid value (``flops="2,0G"``). The command line exits with code 2."""


class CheckpointError(MhacutError):
    """Error for a checkpoint that cannot be read or recognised, or is not safe to read."""


class UnsupportedModelError(MhacutError):
    """Error for a model without attention, or with an attention class that mhacut cannot prune."""


class PlanError(MhacutError):
    """Error for a plan that is inconsistent or does not fit the model."""


class BudgetError(MhacutError):
    """Error for a budget that cannot be reached, or that the dense model already meets."""


class DataError(MhacutError):
    """Error for images or labels that are missing, unreadable, or do not fit the model."""


class OutputError(MhacutError):
    """Error for a file that cannot be written, or must not be overwritten."""


class PeerFailed(MhacutError):
    """Error of another process of the same run. The other process reports the reason."""


OptionWriter = Callable[..., str]


def option_name(name: str, *value: object) -> str:
    """Return an option as messages name it: a Python argument, or a flag on the command line.

    >>> option_name("round_to"), option_name("round_to", 8), option_name("labels", False)
    ('round_to', 'round_to=8', 'labels=False')
    """
    return _write(name, *value)


@contextmanager
def options_written_by(writer: OptionWriter) -> Iterator[OptionWriter]:
    """Context in which the function ``writer`` formats options in messages. Yields the previous writer."""
    # Global, not a context variable, so that other threads name options the same way.
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
