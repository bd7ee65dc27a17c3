"""Best widths within a job's limits and constraints, by its curves, and the cost of the constraints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mhacut.plan import UnitKey
from mhacut.pruning.allocate import cheapest_widths, total_error
from mhacut.pruning.constraints import Constraint
from mhacut.pruning.curves import Curve, divergence_by_cut
from mhacut.pruning.job import Job
from mhacut.pruning.limits import Limits
from mhacut.pruning.widths import MULTIPLE
from mhacut.surgery.costs import CostTable


def job_widths(
    job: Job,
    limits: Limits,
    curves: Mapping[UnitKey, Curve],
    table: CostTable | None = None,
    *,
    exchange: bool = True,
) -> dict[UnitKey, int]:
    """Return the widths of least total error within limits and the job's constraints.

    Args:
        job: what is pruned.
        limits: limits that the plan must keep.
        curves: curves of the job's units.
        table: FLOPs of its model with merges; None for the job's own.
        exchange: whether steps may be exchanged, which takes seconds.
    """
    equal, within = job.constraints.equal_qkv, job.limits_on_widths(limits, table)
    return cheapest_widths(curves, job.allowed, within, exchange=exchange, equal=equal)


def costs_of_constraints(
    job: Job,
    limits: Limits,
    curves: Mapping[UnitKey, Curve],
    widths: Mapping[UnitKey, int],
    table: CostTable,
    usual: Mapping[UnitKey, Curve] | None = None,
) -> tuple[Constraint, ...]:
    """Return the job's constraints, each with the divergence that would be saved without it.

    Multiples are one where they are larger than the usual ones, which they are compared with. Where time is
    limited, widths between its multiples are taken to be as fast as the table of times interpolates.

    Args:
        job: what is pruned.
        limits: limits that the plan keeps.
        curves: curves of the job's units.
        widths: those that were chosen under all constraints.
        table: FLOPs of its model with the merges that were chosen.
        usual: curves at the usual multiples; None leaves multiples out.
    """
    expected = divergence_by_cut(total_error(curves, widths))

    def cost(freer: Job, own: Mapping[UnitKey, Curve]) -> float:
        without = total_error(own, job_widths(freer, limits, own, table, exchange=False))
        return max(expected - divergence_by_cut(without), 0.0)

    found = [
        Constraint(name, value, cost(replace(job, constraints=others), curves))
        for name, value, others in job.constraints.without_each()
    ]
    if usual is not None:
        found.append(Constraint("round_to", job.round_to, cost(replace(job, round_to=MULTIPLE), usual)))
    return tuple(found)
