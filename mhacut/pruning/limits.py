"""Limits: upper bounds on costs of the pruned model that its widths have to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from mhacut.budget import Resource
from mhacut.measuring.time_curve import TimeCurve
from mhacut.plan import UnitKey


@dataclass(frozen=True)
class Limit:
    """Upper bound on one cost, which grows with every width; a time may fall where q/k and v become equal."""

    cost: Callable[[Mapping[UnitKey, int]], int]
    """Cost of the model at given widths."""
    most: int
    resource: Resource = "flops"
    curve: TimeCurve | None = None
    """Where tokens may be merged, a time as a function of FLOPs: it depends on the merges, as FLOPs do."""

    def with_merges_fixed(self, flops: Callable[[Mapping[UnitKey, int]], int], *, merges: bool) -> Limit:
        """Return the limit on the widths of a model whose merges are fixed; a time becomes one on FLOPs.

        Args:
            flops: FLOPs of that model at given widths.
            merges: whether it merges tokens.
        """
        if self.resource == "flops":
            return replace(self, cost=flops)
        if self.curve is None:
            return self
        return Limit(flops, self.curve.flops(self.most, merges=merges))

    def holds(self, widths: Mapping[UnitKey, int]) -> bool:
        return self.cost(widths) <= self.most


Limits = Sequence[Limit]
"""Limits of one model, all of which are to be kept; at least one."""


def keeps(limits: Limits, widths: Mapping[UnitKey, int]) -> bool:
    """Whether ``widths`` keep all of ``limits``."""
    return all(limit.holds(widths) for limit in limits)
