"""Read JSON from files within bounds on size, depth and numbers."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NoReturn

from mhacut.errors import CheckpointError
from mhacut.limits import is_number

MAX_NUMBER = 10**6
"""Largest number among a model's arguments; larger ones are refused before a model is built."""
_MAX_NESTING = 16
_MAX_VALUES = 200_000
"""Largest number of values in one; a value counts as often as it occurs, since a pickle names it once."""
_MAX_ARGUMENT_NESTING = 4
_MAX_ITEMS = 4096
_MAX_TEXT = 4096


def parse_json(text: str, where: str) -> Any:
    """Parse strict JSON: no key twice, no NaN, no nesting that exhausts the stack.

    Args:
        text: the document.
        where: where it stands, for messages.

    Raises:
        CheckpointError: it is not such JSON.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_keys(items, where)
        return dict(items)

    def constant(name: str) -> NoReturn:
        raise CheckpointError(f"{where}: {name} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError:
        raise CheckpointError(f"{where}: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, and integers of thousands of digits
        raise CheckpointError(f"{where}: not valid JSON ({error!s:.200})") from None


def check_no_key_twice(text: str, where: str) -> None:
    """Raise a :class:`CheckpointError` if an object in ``text``, which is known to be JSON, has a key twice.

    Nothing of the document is kept.
    """
    json.loads(text, object_pairs_hook=lambda items: _check_keys(items, where))


def _check_keys(items: list[tuple[str, Any]], where: str) -> None:
    seen: set[str] = set()
    for key, _ in items:
        if key in seen:
            raise CheckpointError(f"{where}: key {key!r:.100} appears twice")
        seen.add(key)


def plain_json(value: object) -> Any:
    """Return ``value`` as JSON gives it back, tuples as lists.

    Raises:
        CheckpointError: it holds anything that JSON has not, NaN and infinity included, or too many values.
    """
    return _plain(value, 0, count(1))


def _plain(value: object, depth: int, numbers: Iterator[int]) -> Any:
    if next(numbers) > _MAX_VALUES:
        raise CheckpointError(f"the model's description holds more than {_MAX_VALUES} values")
    if depth > _MAX_NESTING:
        raise CheckpointError("a value of the model's description is nested too deeply")
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise CheckpointError(f"a value of the model's description is {value}")
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, depth + 1, numbers) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item, depth + 1, numbers) for item in value]
    raise CheckpointError(
        f"a value of the model's description is a {kind_of(value)}; only text, numbers, true, false, none, "
        "lists and objects can be stored"
    )


def bounded(value: Any, where: str, depth: int = 0) -> Any:
    """Return ``value``, a JSON value, unchanged.

    Raises:
        CheckpointError: it is larger, longer or nested deeper than any argument of a model.
    """
    if depth > _MAX_ARGUMENT_NESTING:
        raise CheckpointError(f"{where}: nested too deeply")
    if isinstance(value, str) and len(value) > _MAX_TEXT:
        raise CheckpointError(f"{where}: text of {len(value)} characters, at most {_MAX_TEXT} are allowed")
    if is_number(value) and not abs(value) <= MAX_NUMBER:
        raise CheckpointError(f"{where}: numbers may reach {MAX_NUMBER}, found {shown(value):.50}")
    if isinstance(value, list | dict):
        if len(value) > _MAX_ITEMS:
            raise CheckpointError(f"{where}: {len(value)} items, at most {_MAX_ITEMS} are allowed")
        for item in value.values() if isinstance(value, dict) else value:
            bounded(item, where, depth + 1)
    return value


class _Shown(reprlib.Repr):
    """Text of the first values of any value, whatever it holds and however often."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring = 3, 1000

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < self.maxstring else f"a number of {x.bit_length()} bits"

    def repr_instance(self, x: object, level: int) -> str:
        return repr(x) if x is None or isinstance(x, bool | float) else type(x).__name__


def shown(value: object) -> str:
    """Return the text of an untrusted value of any type, for a message; what is nested deep is left out.

    Values of a pickle may hold each other many times, so that ``repr`` would not end.

    >>> shown([1, (2.5, [None, ["deep"]])])
    '[1, (2.5, [None, [...]])]'
    """
    return _Shown().repr(value)


def kind_of(value: object) -> str:
    """Return the name of the type of ``value`` for a message."""
    return "nothing" if value is None else type(value).__name__
