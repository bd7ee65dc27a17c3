"""Limits: upper bounds on costs of the pruned model that its widths have to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mhacut.budget import Resource
from mhacut.plan import UnitKey


@dataclass(frozen=True)
class Limit:
    """Upper bound on one cost, which grows with every width."""

    cost: Callable[[Mapping[UnitKey, int]], int]
    """Cost of the model at given widths."""
    most: int
    resource: Resource = "flops"

    def holds(self, widths: Mapping[UnitKey, int]) -> bool:
        return self.cost(widths) <= self.most


Limits = Sequence[Limit]
"""Limits of one model, all of which are to be kept; at least one."""


def keeps(limits: Limits, widths: Mapping[UnitKey, int]) -> bool:
    """Whether ``widths`` keep all of ``limits``."""
    return all(limit.holds(widths) for limit in limits)
