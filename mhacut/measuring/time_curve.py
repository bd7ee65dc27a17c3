"""Time of a model as a function of its FLOPs, for cuts of channels and tokens together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mhacut.measuring.layer_times import between, rising


@dataclass(frozen=True)
class TimeCurve:
    """Times of a few measured models, and between them a line.

    Merged tokens make every layer faster, so times of single layers at their dense number of tokens, as
    :class:`mhacut.measuring.layer_times.TimeTable` has them, do not add up. FLOPs count both.
    """

    points: tuple[tuple[int, float], ...]
    """FLOPs and time of each model, relative to the dense model's time; the dense model is one of them."""
    dense: int
    """Nanoseconds per batch of the dense model."""

    @classmethod
    def through(cls, models: Sequence[tuple[int, float]], dense: int) -> TimeCurve:
        """Return the curve through models, whose times are made to rise with their FLOPs.

        Args:
            models: FLOPs and relative time of each; the dense model among them.
            dense: nanoseconds per batch of the dense model.
        """
        return cls(tuple((int(flops), share) for flops, share in rising(models)), dense)

    def at(self, flops: int) -> int:
        """Return the nanoseconds per batch that a model of so many FLOPs is expected to take."""
        return max(round(self.dense * between(self.points, flops)), 0)

    def flops(self, nanoseconds: int) -> int:
        """Return the most FLOPs that are expected to take no longer, within those of the models measured."""
        share = nanoseconds / self.dense
        within = [flops for flops, time in self.points if time <= share]
        if not within or len(within) == len(self.points):
            return within[-1] if within else self.points[0][0]
        (low, before), (high, after) = self.points[len(within) - 1 : len(within) + 1]
        return low + int((high - low) * (share - before) / (after - before))
