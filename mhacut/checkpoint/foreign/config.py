"""Read another library's configuration, which is untrusted, one checked value at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from mhacut.checkpoint.untrusted_json import kind_of
from mhacut.errors import CheckpointError
from mhacut.limits import is_int, is_number

_MAX_NUMBER = 65536
"""Largest number that a configuration may state: a width, a depth, a side in pixels."""
_MAX_STAGES = 16
_MAX_TEXT = 100
_Value = TypeVar("_Value")


class Config:
    """An untrusted JSON object of another library.

    Methods raise a :class:`CheckpointError` for a value of another type than expected, or out of bounds.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        """Keep the object, and the name of its file, or of its place there, for messages."""
        self._values = values
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def fault(self, name: str, expected: str) -> CheckpointError:
        """Return the error of a value that is not as expected."""
        value = self._values.get(name)
        shown = kind_of(value) if isinstance(value, dict) else f"{value!r:.80}"
        return CheckpointError(f"{self.where}: {name}: expected {expected}, found {shown}")

    def get(self, name: str, default: _Value) -> _Value:
        """Return a value of the type of ``default``; that itself where the value is missing, or null.

        Whole numbers are at least 1, or 0 where that is the default. Sides of images and patches may be
        stated as two equal numbers.
        """
        value: Any = self._values.get(name)
        if value is None:
            return default
        if type(default) is int and isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        expected, fits = _expectation(value, default)
        if not fits:
            raise self.fault(name, expected)
        converted: Any = float(value) if isinstance(default, float) else value
        return cast(_Value, converted)

    def read(self, table: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
        """Return arguments of timm, by a table of their names here and the other library's defaults."""
        return {argument: self.get(name, default) for argument, (name, default) in table.items()}

    def numbers(self, name: str, count: int) -> list[float]:
        """Return a list of ``count`` numbers; required."""
        value = self._values.get(name)
        if not isinstance(value, list) or len(value) != count or not all(map(_is_bounded, value)):
            raise self.fault(name, f"a list of {count} numbers")
        return [float(item) for item in value]

    def part(self, name: str) -> Config:
        """Return an object within this one; required."""
        value = self._values.get(name)
        if not isinstance(value, dict):
            raise self.fault(name, "an object")
        return Config(value, f"{self.where}: {name}")

    def raw(self, name: str) -> Any:
        """Return a value as it stands, unchecked; None if it is missing."""
        return self._values.get(name)

    def require(self, fixed: Mapping[str, Any], reason: str) -> None:
        """Refuse any value but the given ones, which are also the defaults, for ``reason``."""
        for name, expected in fixed.items():
            value = expected if name not in self else self._values[name]
            if value != expected or isinstance(value, bool) != isinstance(expected, bool):
                raise CheckpointError(
                    f"{self.where}: {name} {value!r:.80} cannot be converted: {reason}; expected {expected!r}"
                )

    def require_eps(self, timms: float, default: float, name: str = "layer_norm_eps") -> None:
        """Refuse an epsilon of norms that differs from timm's.

        One that is smaller than 1e-6 is taken for it: with 1e-6 for 1e-12, logits agree within 1e-5.
        """
        stated = self.get(name, default)
        if abs(stated - timms) > 1.5e-6:
            raise CheckpointError(
                f"{self.where}: {name} {stated:g} cannot be converted: the norms of timm's model "
                f"add {timms:g}"
            )


def _expectation(value: Any, default: Any) -> tuple[str, bool]:
    """Return what is expected in place of ``default``, in words, and whether ``value`` is that."""
    least = 0 if default == 0 else 1
    if isinstance(default, bool):
        return "true or false", isinstance(value, bool)
    if isinstance(default, str):
        fits = isinstance(value, str) and len(value) <= _MAX_TEXT
        return f"a text of at most {_MAX_TEXT} characters", fits
    if isinstance(default, float):
        return f"a number from 0 to {_MAX_NUMBER}", _is_bounded(value) and value >= 0
    if isinstance(default, list):
        fits = isinstance(value, list) and 1 <= len(value) <= _MAX_STAGES
        fits = fits and all(is_int(item) and 0 <= item <= _MAX_NUMBER for item in value)
        return f"a list of at most {_MAX_STAGES} whole numbers up to {_MAX_NUMBER}", fits
    fits = is_int(value) and least <= value <= _MAX_NUMBER
    return f"a whole number from {least} to {_MAX_NUMBER}, or two equal ones", fits


def _is_bounded(value: Any) -> bool:
    return is_number(value) and abs(value) <= _MAX_NUMBER
