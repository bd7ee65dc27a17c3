"""Variables by which torchrun numbers the processes of a run; read without torch.

They count beside a ``WORLD_SIZE`` above 1 only: a lone ``RANK`` is left over from something else.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from mhacut.errors import UsageError

_MOST = 10**6
"""Largest number of processes that is believed."""
_SHOWN = 20
"""Characters of a wrong value that a message shows."""


def world_size() -> int:
    """Return the number of processes that share the run; 1 where nothing launched them.

    Raises:
        UsageError: ``WORLD_SIZE`` is no such number.
    """
    return _number("WORLD_SIZE", 1, _MOST) if os.environ.get("WORLD_SIZE") else 1


def rank() -> int:
    """Return the number of this process among all.

    Raises:
        UsageError: ``WORLD_SIZE`` or ``RANK`` is no such number, or ``RANK`` is missing.
    """
    size = world_size()
    return _number("RANK", 0, size - 1) if size > 1 else 0


def local_rank() -> int:
    """Return the number of this process among those of its machine, 0 where it is not set.

    Raises:
        UsageError: ``WORLD_SIZE`` or ``LOCAL_RANK`` is no such number.
    """
    size = world_size()
    return _number("LOCAL_RANK", 0, size - 1) if size > 1 and os.environ.get("LOCAL_RANK") else 0


def believed(number: Callable[[], int]) -> int:
    """Return ``number()``, 0 where variables are wrong: for what is shown, since work is refused then."""
    try:
        return number()
    except UsageError:
        return 0


def check_launch() -> None:
    """Check that the processes of a run can find each other.

    Raises:
        UsageError: a variable is missing or wrong.
    """
    rank()
    if not os.environ.get("MASTER_ADDR"):
        raise _wrong("MASTER_ADDR", "the name of a machine")
    _number("MASTER_PORT", 0, 65535)


def _number(name: str, least: int, most: int) -> int:
    found = os.environ.get(name, "")
    digits = found.isascii() and found.isdecimal() and len(found) <= len(str(_MOST))
    if not digits or not least <= int(found) <= most:
        raise _wrong(name, f"a whole number from {least} to {most}")
    return int(found)


def _wrong(name: str, expected: str) -> UsageError:
    value = os.environ.get(name)
    found = "is not set" if value is None else f"is {value[:_SHOWN]!r}{'...' * (len(value) > _SHOWN)}"
    beside = "" if name == "WORLD_SIZE" else f" beside WORLD_SIZE={os.environ.get('WORLD_SIZE')}"
    return UsageError(
        f"environment variable {name} {found}; expected {expected}{beside}; torchrun sets it, without "
        "torchrun unset WORLD_SIZE"
    )
