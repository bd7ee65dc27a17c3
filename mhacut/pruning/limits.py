"""Widths that are allowed: multiples, constraints set by hand, and limits on costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from mhacut.errors import UsageError, option_name
from mhacut.measuring.predicted_time import TimeCurve
from mhacut.plan import UnitKey


@dataclass(frozen=True)
class Limit:
    """Upper bound on the cost of a model as a function of its widths."""

    # Costs grow with each width, except that attention may run faster if q/k and v widths are equal.
    cost: Callable[[Mapping[UnitKey, int]], int]
    most: int
    resource: str = "flops"
    """Option name of the limited budget, such as ``max_latency``."""
    curve: TimeCurve | None = None
    """Time as a function of FLOPs, token merging included. None if ``cost`` depends on widths only."""

    def with_merges_fixed(self, flops: Callable[[Mapping[UnitKey, int]], int], *, merges: bool) -> Limit:
        """Return the limit for fixed merges. A limit on time becomes a limit on FLOPs."""
        if self.resource == "flops":
            return replace(self, cost=flops)
        if self.curve is None:
            return self
        return Limit(flops, self.curve.flops(self.most, merges=merges))

    def holds(self, widths: Mapping[UnitKey, int]) -> bool:
        return self.cost(widths) <= self.most


Limits = Sequence[Limit]


def keeps(limits: Limits, widths: Mapping[UnitKey, int]) -> bool:
    return all(limit.holds(widths) for limit in limits)


MULTIPLE = 8
"""Default of ``--round-to``: widths are multiples of this number of channels."""


def width_choices(dense: int, round_to: int) -> tuple[int, ...]:
    """Return the multiples of ``round_to`` below the dense width, then the dense width."""
    return (*range(round_to, dense, round_to), dense)


def nearest_width(count: float, dense: int, round_to: int) -> int:
    """Return the possible width nearest to ``count``; of 2 equally near widths, the smaller."""
    return min(width_choices(dense, round_to), key=lambda width: abs(width - count))


def lowest_flops(
    choices: Mapping[UnitKey, Sequence[int]], flops: Callable[[Mapping[UnitKey, int]], int]
) -> int:
    """Return the cost of the model at the least width of every unit."""
    return flops({key: widths[0] for key, widths in choices.items()})


Choices = Mapping[UnitKey, Sequence[int]]
"""Allowed widths of each unit in ascending order. The last is the dense width."""


@dataclass(frozen=True)
class Constraints:
    """User constraints on widths: ``--exclude``, ``--min-width``, ``--equal-qkv``.

    Patterns match names of layers (``blocks.0.attn``) or units (``blocks.0.attn.qk``).
    """

    exclude: tuple[str, ...] = ()
    min_width: tuple[str, ...] = ()
    """Entries ``PATTERN=N``: units whose names match PATTERN keep at least N channels per head."""
    equal_qkv: bool = False

    def __bool__(self) -> bool:
        return bool(self.exclude or self.min_width or self.equal_qkv)

    def allowed(self, choices: Choices) -> dict[UnitKey, tuple[int, ...]]:
        left = {key: tuple(widths) for key, widths in choices.items()}
        for pattern in self.exclude:
            for key in _matching("exclude", pattern, pattern, choices):
                left[key] = left[key][-1:]
        for text in self.min_width:
            pattern, equals, number = text.rpartition("=")
            if not equals or not pattern or not number.isdecimal() or int(number) < 1:
                raise UsageError(
                    f"{option_name('min_width', text)}: expected PATTERN=N, like blocks.0.*=32, with N at "
                    "least 1"
                )
            least = int(number)
            for key in _matching("min_width", text, pattern, choices):
                left[key] = tuple(width for width in left[key] if width >= least) or left[key][-1:]
        if self.equal_qkv:
            for qk, v in qk_and_v(choices):
                if choices[qk][-1] != choices[v][-1]:
                    raise UsageError(
                        f"{option_name('equal_qkv', True)}: expected q/k and v of one width, found "
                        f"{choices[qk][-1]} and {choices[v][-1]} channels per head in {qk[0]}"
                    )
                # Choices are equal above, but constraints on one of the two may have removed some.
                both = set(left[qk]) & set(left[v])
                left[qk] = left[v] = tuple(width for width in left[qk] if width in both)
            paired = {key for pair in qk_and_v(choices) for key in pair}
            # Where only q/k or only v can be cut, both keep all channels.
            for key in left:
                if key[1] != "hidden" and key not in paired:
                    left[key] = left[key][-1:]
        return left

    def __iter__(self) -> Iterator[tuple[str, str | bool]]:
        """Yield (option name, value) of each constraint."""
        yield from (("exclude", pattern) for pattern in self.exclude)
        yield from (("min_width", text) for text in self.min_width)
        if self.equal_qkv:
            yield "equal_qkv", True


NO_CONSTRAINTS = Constraints()


def qk_and_v(choices: Choices) -> list[tuple[UnitKey, UnitKey]]:
    return [
        ((layer, "qk"), (layer, "v")) for layer, kind in choices if kind == "v" and (layer, "qk") in choices
    ]


def _matching(option: str, value: str, pattern: str, choices: Choices) -> list[UnitKey]:
    matches = [
        (layer, kind)
        for layer, kind in choices
        if fnmatchcase(layer, pattern) or fnmatchcase(f"{layer}.{kind}", pattern)
    ]
    if not matches:
        names = [f"{layer}.{kind}" for layer, kind in choices]
        raise UsageError(
            f"{option_name(option, value)}: matches no layer that may be pruned; found {', '.join(names[:3])}"
            f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        )
    return matches
