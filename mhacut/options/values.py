"""Kinds of values that options take."""

from __future__ import annotations

import os
from numbers import Integral, Real
from types import UnionType
from typing import Any, Union, get_args, get_origin


def plain(value: Any) -> Any:
    """Return a number or an array of NumPy or torch as Python's own numbers; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def is_text(value: str | bytes) -> bool:
    """Whether ``value`` can be part of a path; YAML and Python can spell text that cannot."""
    try:
        return b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def types(kind: Any) -> tuple[Any, ...]:
    """Return the classes of which one must be the value's; None is left out."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return tuple(get_origin(part) or part for part in parts if part is not type(None))


def is_one(value: object, types: tuple[Any, ...]) -> bool:
    """Whether ``value`` is of one of ``types``; whole numbers are numbers, and True is none."""
    if types == (bool,):
        return isinstance(value, int) and value in (0, 1)
    if types in ((int,), (float,)):
        return isinstance(value, Integral if int in types else Real) and not isinstance(value, bool)
    return isinstance(value, types)
