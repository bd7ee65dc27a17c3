"""Parsing of budgets (``2.0G``, ``50%``), and formatting of FLOPs, parameters, bytes and times."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from mhacut.errors import UsageError, option_name

_BUDGET = re.compile(
    r"(?P<number>\d+(?:\.\d*)?(?:[eE]\+?\d+)?|\.\d+)(?P<unit>[KMGT]i?B|B|ns|us|ms|s|[KMGT%]?)"
)
_COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BYTES = {"": 1.0, "B": 1.0} | {
    f"{prefix}{i}B": base ** (power + 1)
    for power, prefix in enumerate("KMGT")
    for i, base in (("", 1e3), ("i", 1024.0))
}
_TIMES = {"ns": 1.0, "us": 1e3, "ms": 1e6, "s": 1e9}


class Kind(NamedTuple):
    """Units, noun and examples of the budgets of a resource."""

    units: Mapping[str, float]
    noun: str
    """Noun after an amount in messages; empty if :func:`format_amount` adds a unit."""
    forms: str
    """Valid budgets, as examples in error messages."""


KINDS: Mapping[str, Kind] = {
    "flops": Kind(_COUNTS, "FLOPs", "2.0G, 600M, 2e9 or 50%"),
    "params": Kind(_COUNTS, "parameters", "2.8M, 900K, 3e6 or 50%"),
    "size": Kind(_BYTES, "", "6MB, 800KB, 5.5MiB, 6e6 or 50%"),
    "max_latency": Kind(_TIMES, "", "12ms, 0.012s, 800us or 50% of the dense model's time"),
}
"""Resources that a budget can limit, by option name. Amounts are in FLOPs, parameters, bytes and ns per
batch."""


class Budget(str):
    """Parsed budget text: an amount of a resource, or a fraction of the dense model's amount."""

    __slots__ = ("relative", "resource", "value")
    value: float
    """Amount of the resource. If ``relative``: fraction of the dense model's amount, in (0, 1]."""
    relative: bool
    resource: str
    """Option name of the resource: ``flops``, ``params``, ``size`` or ``max_latency``."""

    @classmethod
    def parse(cls, text: str | float, resource: str = "flops") -> Budget:
        """Parse a budget: ``2.0G``, ``2e9`` or ``50%``, a size such as ``6MB``, or a time such as ``12ms``.

        >>> Budget.parse("2.0G").amount(dense=4_608_338_304)
        2000000000
        >>> Budget.parse("50%").amount(dense=4_608_338_304)
        2304169152
        >>> Budget.parse("6MB", "size").amount(dense=11_000_000)
        6000000
        >>> Budget.parse("12ms", "max_latency").amount(dense=20_000_000)
        12000000
        """
        budget = cls(text)
        match = _BUDGET.fullmatch(budget)
        units = {**KINDS[resource].units, "%": 0.01}
        value = 0.0
        if match is not None and match["unit"] in units:
            value = float(match["number"]) * units[match["unit"]]
        if match is None or not 0 < value < float("inf"):
            raise UsageError(f"{option_name(resource, text)} is not a budget; write {KINDS[resource].forms}")
        budget.value, budget.resource, budget.relative = value, resource, match["unit"] == "%"
        if budget.relative and value > 1:
            raise UsageError(
                f"{option_name(resource, text)} is more than the dense model has; write at most 100%"
            )
        return budget

    def amount(self, dense: int) -> int:
        """Return the budget as an amount of the resource; ``dense`` is the amount of the dense model."""
        exact = self.value * dense if self.relative else self.value
        return math.floor(round(exact, 3))  # 8.20G is a little below 8200000000 as a product of floats

    @property
    def label(self) -> str:
        """Text of the budget in file names: ``2.0G``, ``50pct``, ``params60pct``, ``latency12ms``."""
        text = self.replace("%", "pct")
        return text if self.resource == "flops" else self.resource.removeprefix("max_") + text


def format_amount(amount: float, resource: str, *, up: bool = False) -> str:
    """Format an amount with 3 digits or more, and with its unit for a size or time. ``up``: round up.

    >>> format_amount(2_800_000, "params"), format_amount(5_717_000, "size")
    ('2.80M', '5.72MB')
    >>> format_amount(12_340_000, "max_latency"), format_amount(12_340_000, "max_latency", up=True)
    ('12.3ms', '12.4ms')
    """
    units = KINDS[resource].units
    # A time is shown rounded up where it is to be given as a budget: rounded down it would be out of reach.
    if units is _TIMES:
        milliseconds = amount / 1e6
        digits = max(0, 2 - math.floor(math.log10(milliseconds))) if milliseconds > 0 else 0
        scaled = milliseconds * 10**digits
        return f"{(math.ceil(scaled - 1e-6) if up else round(scaled)) / 10**digits:.{digits}f}ms"
    return format_flops(amount, up=up) + ("B" if units is _BYTES else "")


def format_flops(flops: float, *, up: bool = False) -> str:
    """Format a count with 3 significant digits. ``up``: round up, so that the text is a sufficient budget.

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
