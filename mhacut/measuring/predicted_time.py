"""Predicted time of a pruned model, from the times of its layers, or from its FLOPs if tokens are merged.

The time of a model is a constant plus the times of its layers. Layers in isolation are not exactly as fast as
in the model, so a line through a few timed models corrects the saved time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

_PAIR = ("qk", "v")
"""Kinds of channels in attention layers. A layer is faster if both kinds have the same width."""


@dataclass(frozen=True)
class Point:
    widths: Mapping[str, int]
    """Channels per head, by kind (qk, v or hidden)."""
    share: float
    """Time of the layer divided by the time of the dense model."""


@dataclass(frozen=True)
class LayerTimes:
    """Times of a layer at a few widths, interpolated linearly.

    Time savings of q/k, v and hidden channels are added. Unequal q/k and v widths get a time penalty.
    """

    dense: Point
    others: tuple[Point, ...]
    _known: dict[tuple[int, ...], float] = field(default_factory=dict, repr=False, compare=False)

    def at(self, widths: Mapping[str, int]) -> float:
        key = tuple(widths[kind] for kind in self.dense.widths)
        if key not in self._known:
            self._known[key] = self._at(widths)
        return self._known[key]

    def _at(self, widths: Mapping[str, int]) -> float:
        pair = self._pair
        time = self.dense.share if pair is None else pair.at(*(widths[kind] for kind in _PAIR))
        for kind in self.dense.widths:
            if pair is None or kind not in _PAIR:
                time += _between(self._alone(kind), widths[kind]) - self.dense.share
        return max(time, 0.0)

    def _alone(self, kind: str) -> list[tuple[float, float]]:
        """Return (width, time) of the measured points at which only channels of ``kind`` are cut."""
        cut = [(point.widths[kind], point.share) for point in self.others if self._cuts(point) == {kind}]
        return _rising([*cut, (self.dense.widths[kind], self.dense.share)])

    @cached_property
    def _pair(self) -> _PairTimes | None:
        dense = [self.dense.widths.get(kind) for kind in _PAIR]
        if dense[0] is None or dense[0] != dense[1]:
            return None
        times = {
            (point.widths["qk"], point.widths["v"]): point.share
            for point in (self.dense, *self.others)
            if self._cuts(point) <= set(_PAIR)
        }
        return _PairTimes.of(times) if any(qk == v < dense[0] for qk, v in times) else None

    def _cuts(self, point: Point) -> set[str]:
        return {kind for kind, width in point.widths.items() if width < self.dense.widths[kind]}


@dataclass(frozen=True)
class _PairTimes:
    equal: list[tuple[float, float]]
    """Pairs of (width, time) at equal q/k and v widths."""
    skew: list[tuple[float, float]]
    """Pairs of (width, time of q/k minus time of v at the same width), up to a constant."""
    extra: list[tuple[float, float]]
    """Pairs of (difference between q/k and v width, extra time compared with equal widths)."""

    @classmethod
    def of(cls, times: Mapping[tuple[int, int], float]) -> _PairTimes:
        """Fit the times of (q/k, v) width pairs. Unequal pairs must be measured in both orders."""
        # A kernel pads the narrower of q/k and v, or takes another path. The difference between both ways
        # round is the skew of the two widths; what their mean takes beyond equal widths is the extra.
        equal = _rising([(qk, time) for (qk, v), time in times.items() if qk == v])
        unequal = sorted((pair for pair in times if pair[0] > pair[1]), reverse=True)
        skew, extra = {equal[-1][0]: 0.0}, []
        for wide, narrow in unequal:
            wide_qk, wide_v = times[wide, narrow], times[narrow, wide]
            if narrow in skew:
                skew[wide] = skew[narrow] + wide_qk - wide_v
            else:
                at_wide = skew.setdefault(wide, _between(sorted(skew.items()), wide))
                skew[narrow] = at_wide - (wide_qk - wide_v)
            as_equal = (_between(equal, wide) + _between(equal, narrow)) / 2
            extra.append((float(wide - narrow), max((wide_qk + wide_v) / 2 - as_equal, 0.0)))
        return cls(equal, sorted(skew.items()), sorted(extra))

    def at(self, qk: int, v: int) -> float:
        if qk == v:
            return _between(self.equal, qk)
        time = (_between(self.equal, qk) + _between(self.equal, v)) / 2
        time += (_between(self.skew, qk) - _between(self.skew, v)) / 2
        if self.extra:
            time += max(_between(self.extra, abs(qk - v)), 0.0)
        return max(time, _between(self.equal, min(qk, v)))


def _rising(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    # Isotonic by the mean of the two monotone envelopes; a plan must never seem faster by keeping more.
    widths, times = zip(*sorted(points), strict=True)
    above = accumulate(times, max)
    below = reversed(list(accumulate(reversed(times), min)))
    return [(width, (high + low) / 2) for width, high, low in zip(widths, above, below, strict=True)]


def _between(points: Sequence[tuple[float, float]], at: float) -> float:
    if len(points) == 1:
        return points[0][1]
    right = min(max(bisect_right([first for first, _ in points], at), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0) if x1 > x0 else y1


@dataclass(frozen=True)
class TimeTable:
    """Predicted time of a model at any widths, from the times of its layers."""

    calls: tuple[tuple[str, int], ...]
    """Layer calls in a forward pass, each with the layer name and its index in ``layers``."""
    layers: tuple[LayerTimes, ...]
    uncut: float
    """Time of the model with all channels, divided by the time of the dense model. Below 1 if tokens are
    merged or left out."""
    anchors: tuple[tuple[float, float], ...] = ()
    """Pair for each timed model: (sum of the time saved in its layers, time saved by the whole model). Both
    are divided by the time of the dense model."""
    dense: int = 10**9
    """Latest measured time of the dense model, in nanoseconds per batch."""

    def at(self, widths: Mapping[Any, int]) -> int:
        """Return the predicted nanoseconds per batch at ``widths``. Channels without an entry are uncut."""
        # Savings, not times, are scaled: what no layer accounts for (embedding, norms, head) stays as it is.
        saved = self.saved_by_layers(widths)
        if self.anchors:
            saved = _between(_rising([(0.0, 0.0), *self.anchors]), saved)
        return round(self.dense * max(self.uncut - saved, 0.0))

    def saved_by_layers(self, widths: Mapping[Any, int]) -> float:
        saved = 0.0
        for name, index in self.calls:
            times = self.layers[index]
            cut = {kind: widths.get((name, kind), width) for kind, width in times.dense.widths.items()}
            saved += times.dense.share - times.at(cut)
        return saved

    def with_anchors(self, models: Sequence[tuple[Mapping[Any, int], float]]) -> TimeTable:
        anchors = [(self.saved_by_layers(widths), max(self.uncut - share, 0.0)) for widths, share in models]
        return replace(self, anchors=tuple(anchor for anchor in anchors if anchor[0] > 0))


def points_to_measure(choices: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    dense = {kind: widths[-1] for kind, widths in choices.items()}
    points = [dense]
    paired = all(kind in choices for kind in _PAIR) and len({tuple(choices[kind]) for kind in _PAIR}) == 1
    if paired:
        widths = choices["qk"]
        points += [{**dense, "qk": width, "v": width} for width in _spread(widths, range(4))]
        middle = _spread(widths, (1, 2))  # widths that differ a little, and as much as they can
        unequal = {(middle[0], middle[-1]), (widths[0], widths[-1])} if middle else set[tuple[int, int]]()
        for narrow, wide in sorted((narrow, wide) for narrow, wide in unequal if narrow < wide):
            points += [{**dense, "qk": wide, "v": narrow}, {**dense, "qk": narrow, "v": wide}]
    for kind, widths in choices.items():
        if not (paired and kind in _PAIR):
            points += [{**dense, kind: width} for width in _spread(widths, range(4))]
    return points


def _spread(choices: Sequence[int], quarters: Iterable[int]) -> list[int]:
    dense = choices[-1]
    nearest = {min(choices, key=lambda width: abs(width - dense * part / 4)) for part in quarters}
    return sorted(nearest - {dense})


# -- by FLOPs --

Line = tuple[tuple[int, float], ...]
"""Pairs of (FLOPs, time divided by the time of the dense model) of a few models, ascending."""


@dataclass(frozen=True)
class TimeCurve:
    """Predicted time of a model as a function of its FLOPs, interpolated between timed models.

    Models that merge tokens have a separate line, because FLOPs do not include the time of token matching.
    """

    cut: Line
    """Line through timed models without token merging, including the dense model."""
    merged: Line
    """Line through timed models with token merging."""
    dense: int
    """Measured time of the dense model, in nanoseconds per batch."""
    factors: tuple[float, float] = (1.0, 1.0)
    """Correction factors of the lines ``cut`` and ``merged``, from later time measurements."""

    @classmethod
    def through(
        cls, cut: Sequence[tuple[int, float]], merged: Sequence[tuple[int, float]], dense: int
    ) -> TimeCurve:
        """Return the curve through timed models. A model is dropped if a model of more FLOPs is faster."""
        return cls(_fastest(cut), _fastest(merged), dense)

    def with_measured(self, flops: int, nanoseconds: int, *, merges: bool) -> TimeCurve:
        """Return a curve that passes through a timed model: the line ``merged`` or ``cut`` is scaled."""
        # One factor a line: what matching tokens takes is no FLOP, and on one of the two lines only.
        plain = replace(self, factors=(1.0, 1.0)).at(flops, merges=merges)
        factor = nanoseconds / max(plain, 1)
        return replace(self, factors=(self.factors[0], factor) if merges else (factor, self.factors[1]))

    def at(self, flops: int, *, merges: bool) -> int:
        line = self.merged if merges else self.cut
        return max(round(self.factors[merges] * self.dense * _between(line, flops)), 0)

    def flops(self, nanoseconds: int, *, merges: bool) -> int:
        """Return the maximum FLOPs for a time in nanoseconds per batch; negative if the time is too short."""
        line, share = self.merged if merges else self.cut, nanoseconds / (self.factors[merges] * self.dense)
        if len(line) == 1:
            return line[0][0] if line[0][1] <= share else -1
        return int(_between([(time, flops) for flops, time in line], share))


def _fastest(models: Sequence[tuple[int, float]]) -> Line:
    line: list[tuple[int, float]] = []
    for flops, share in sorted(models):
        while line and line[-1][1] >= share:
            line.pop()
        if not line or flops > line[-1][0]:
            line.append((flops, share))
    return tuple(line)
