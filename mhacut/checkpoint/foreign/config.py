"""Read another library's configuration, one checked value at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mhacut.checkpoint.untrusted_json import kind_of
from mhacut.errors import CheckpointError
from mhacut.limits import is_int, is_number

_MAX_SIZE = 65536
"""Largest width, depth or side in pixels that a configuration may state."""
_MAX_STAGES = 16
_MAX_TEXT = 100


class Config:
    """An untrusted JSON object of another library.

    A value that is missing, or null, is the ``default`` of a method that takes one: that of the other
    library. Methods that check a value raise a :class:`CheckpointError` if it has another type or is out of
    bounds.
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
        found = kind_of(value) if isinstance(value, dict) else f"{value!r:.80}"
        return CheckpointError(f"{self.where}: {name}: expected {expected}, found {found}")

    def size(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """Return a whole number from ``least`` to 65536; required if ``default`` is None."""
        value = self._get(name, default)
        if not is_int(value) or not least <= value <= _MAX_SIZE:
            raise self.fault(name, f"a whole number from {least} to {_MAX_SIZE}")
        return value

    def side(self, name: str, default: int | None = None) -> int:
        """Return the side of a square in pixels, stated as one number or as two equal ones."""
        value = self._get(name, default)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if not is_int(value) or not 1 <= value <= _MAX_SIZE:
            raise self.fault(name, f"the side of a square, from 1 to {_MAX_SIZE} pixels")
        return value

    def sizes(self, name: str, default: tuple[int, ...], *, least: int = 1) -> list[int]:
        """Return a list of whole numbers from ``least`` to 65536, one for each of at most 16 stages."""
        value = self._get(name, list(default))
        if not isinstance(value, list) or not 1 <= len(value) <= _MAX_STAGES:
            raise self.fault(name, f"a list of at most {_MAX_STAGES} whole numbers")
        if not all(is_int(item) and least <= item <= _MAX_SIZE for item in value):
            raise self.fault(name, f"whole numbers from {least} to {_MAX_SIZE}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number from 0 to 65536; required if ``default`` is None."""
        value = self._get(name, default)
        if not is_number(value) or not 0 <= value <= _MAX_SIZE:
            raise self.fault(name, f"a number from 0 to {_MAX_SIZE}")
        return float(value)

    def numbers(self, name: str, count: int) -> list[float]:
        """Return a list of ``count`` numbers, each at most 65536 in size; required."""
        value = self._values.get(name)
        if not isinstance(value, list) or len(value) != count:
            raise self.fault(name, f"a list of {count} numbers")
        if not all(is_number(item) and abs(item) <= _MAX_SIZE for item in value):
            raise self.fault(name, f"numbers of at most {_MAX_SIZE}")
        return [float(item) for item in value]

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.fault(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """Return a text of at most 100 characters; required if ``default`` is None."""
        value = self._get(name, default)
        if not isinstance(value, str) or len(value) > _MAX_TEXT:
            raise self.fault(name, f"a text of at most {_MAX_TEXT} characters")
        return value

    def part(self, name: str) -> Config:
        """Return an object within this one; required."""
        value = self._values.get(name)
        if not isinstance(value, dict):
            raise self.fault(name, "an object")
        return Config(value, f"{self.where}: {name}")

    def raw(self, name: str) -> Any:
        """Return a value as it stands, unchecked; None if it is missing."""
        return self._values.get(name)

    def require(self, name: str, default: Any, *, reason: str) -> None:
        """Refuse any value but ``default``, for ``reason``."""
        value = self._get(name, default)
        if value != default or isinstance(value, bool) != isinstance(default, bool):
            raise CheckpointError(
                f"{self.where}: {name} {value!r:.80} cannot be converted: {reason}; expected {default!r}"
            )

    def _get(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        return default if value is None else value
