"""Time of a model as a function of its FLOPs, for cuts of channels and tokens together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

Line = tuple[tuple[int, float], ...]
"""FLOPs and time of a few models, relative to the dense model's time; both rise."""


@dataclass(frozen=True)
class TimeCurve:
    """Times of a few measured models, and lines between them.

    Merged tokens make every layer faster, so times of single layers at their dense number of tokens, as
    :class:`mhacut.measuring.layer_times.TimeTable` has them, do not add up. FLOPs count both. They do not
    count what matching tokens takes, so models that merge have a line of their own.
    """

    cut: Line
    """Through models that merge no tokens, the dense one among them."""
    merged: Line
    """Through models that merge tokens."""
    dense: int
    """Nanoseconds per batch of the dense model."""
    factors: tuple[float, float] = (1.0, 1.0)
    """Corrections of the two lines, by models that were measured later."""

    @classmethod
    def through(
        cls, cut: Sequence[tuple[int, float]], merged: Sequence[tuple[int, float]], dense: int
    ) -> TimeCurve:
        """Return the curve through models; one that is faster than another of fewer FLOPs replaces it.

        Args:
            cut: FLOPs and relative time of models that merge no tokens, the dense model among them.
            merged: of models that merge tokens.
            dense: nanoseconds per batch of the dense model.
        """
        return cls(_rising(cut), _rising(merged), dense)

    def with_measured(self, flops: int, nanoseconds: int, *, merges: bool) -> TimeCurve:
        """Return the curve with one line scaled so that it goes through one more model."""
        plain = replace(self, factors=(1.0, 1.0)).at(flops, merges=merges)
        factor = nanoseconds / max(plain, 1)
        return replace(self, factors=(self.factors[0], factor) if merges else (factor, self.factors[1]))

    def at(self, flops: int, *, merges: bool) -> int:
        """Return the nanoseconds per batch that a model of so many FLOPs is expected to take."""
        line, dense = self.merged if merges else self.cut, self.factors[merges] * self.dense
        if len(line) == 1:
            return round(dense * line[0][1])
        (x0, y0), (x1, y1) = _part(line, sum(x < flops for x, _ in line))
        return max(round(dense * _on_line((x0, y0), (x1, y1), flops)), 0)

    def flops(self, nanoseconds: int, *, merges: bool) -> int:
        """Return the most FLOPs that are expected to take no longer; below 0 if none are."""
        line, share = self.merged if merges else self.cut, nanoseconds / (self.factors[merges] * self.dense)
        if len(line) == 1:
            return line[0][0] if line[0][1] <= share else -1
        (x0, y0), (x1, y1) = _part(line, sum(y <= share for _, y in line))
        return int(_on_line((y0, x0), (y1, x1), share))


def _rising(models: Sequence[tuple[int, float]]) -> Line:
    found: list[tuple[int, float]] = []
    for flops, share in sorted(models):
        while found and found[-1][1] >= share:
            found.pop()
        if not found or flops > found[-1][0]:
            found.append((flops, share))
    return tuple(found)


def _part(line: Line, place: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the neighbours before and at ``place``, or the nearest two."""
    high = min(max(place, 1), len(line) - 1)
    return line[high - 1], line[high]


def _on_line(one: tuple[float, float], other: tuple[float, float], at: float) -> float:
    (x0, y0), (x1, y1) = one, other
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
