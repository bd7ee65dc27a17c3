"""Budgets as people write them, and FLOPs as people read them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from mhacut.errors import UsageError, option_name

_BUDGET = re.compile(r"(?P<number>\d+(?:\.\d*)?(?:[eE]\+?\d+)?|\.\d+)(?P<unit>[KMGT%]?)")
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Budget:
    """A FLOPs budget: a count, or a share of what the model has now. One FLOP is one multiply-accumulate."""

    text: str
    """Text as the user wrote it."""
    value: float
    """FLOPs, or a fraction in (0, 1] when ``relative``."""
    relative: bool

    @classmethod
    def parse(cls, text: str | float) -> Budget:
        """Read ``2.0G``, ``600M``, ``2e9`` or ``50%``.

        >>> Budget.parse("2.0G").flops(dense=4_608_338_304)
        2000000000
        >>> Budget.parse("50%").flops(dense=4_608_338_304)
        2304169152

        Raises:
            UsageError: anything else.
        """
        text = str(text)
        match = _BUDGET.fullmatch(text)
        value = 0.0
        if match is not None:
            relative = match["unit"] == "%"
            value = float(match["number"]) * (0.01 if relative else _UNITS[match["unit"]])
        if match is None or not 0 < value < float("inf"):
            raise UsageError(f"{option_name('flops', text)} is not a budget; write 2.0G, 600M, 2e9 or 50%")
        if relative and value > 1:
            asked = option_name("flops", text)
            raise UsageError(f"{asked} is more than the model has; a share is at most 100%")
        return cls(text, value, relative)

    def flops(self, dense: int) -> int:
        """The budget in FLOPs for a model that has ``dense``."""
        return int(self.value * dense) if self.relative else int(self.value)

    @property
    def label(self) -> str:
        """The text for a file name: ``2.0G``, ``50pct``."""
        return self.text.replace("%", "pct")


def format_flops(flops: float, *, up: bool = False) -> str:
    """Three significant digits, rounded, or ``up`` so that the text as a budget is not below the count.

    >>> format_flops(4_608_338_304), format_flops(183_400_000), format_flops(950)
    ('4.61G', '183M', '950')
    >>> format_flops(300_600_001), format_flops(300_600_001, up=True)
    ('301M', '301M')
    >>> format_flops(301_400_001), format_flops(301_400_001, up=True)
    ('301M', '302M')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if flops >= 0.9995 * size:
            value = flops / size
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            if up:
                value = math.ceil(value * 10**digits - 1e-9) / 10**digits
            return f"{value:.{digits}f}{unit}"
    return f"{flops:.0f}"
