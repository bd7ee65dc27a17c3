"""Best widths within a job's limits and constraints, by its curves, and the cost of the constraints."""

from __future__ import annotations

from collections.abc import Mapping

from mhacut.plan import UnitKey
from mhacut.pruning.allocate import cheapest_widths, total_error
from mhacut.pruning.constraints import Choices, Constraint
from mhacut.pruning.curves import Curve, divergence_by_cut, interpolated
from mhacut.pruning.job import Job
from mhacut.surgery.costs import CostTable


def job_widths(
    job: Job, curves: Mapping[UnitKey, Curve], table: CostTable | None = None, *, exchange: bool = True
) -> dict[UnitKey, int]:
    """Return the widths of least total error that the job's limits and constraints allow.

    Args:
        job: what is pruned.
        curves: of its units.
        table: FLOPs of its model with merges; None for the job's own.
        exchange: whether steps may be exchanged, which takes seconds.
    """
    equal, limits = job.constraints.equal_qkv, job.limits(table)
    return cheapest_widths(curves, job.allowed, limits, exchange=exchange, equal=equal)


def costs_of_constraints(
    job: Job, curves: Mapping[UnitKey, Curve], widths: Mapping[UnitKey, int], table: CostTable
) -> tuple[Constraint, ...]:
    """Return the job's constraints, each with the divergence that would be saved without it.

    Without multiples, every width is allowed from the least one that was measured on; curves are
    interpolated. So is a table of times, which does not know what odd widths cost kernels.

    Args:
        job: what is pruned.
        curves: of its units.
        widths: those that were chosen under all constraints.
        table: FLOPs of its model with the merges that were chosen.
    """
    found, expected = [], divergence_by_cut(total_error(curves, widths))
    limits = job.limits(table)
    for name, value, others in job.constraints.without_each():
        choices: Choices = job.choices
        own = curves
        if name == "round_to":
            choices = {key: range(some[0], some[-1] + 1) for key, some in job.measured.items()}
            own = {key: interpolated(curve, choices[key]) for key, curve in curves.items()}
        freer = cheapest_widths(own, others.allowed(choices), limits, exchange=False, equal=others.equal_qkv)
        without = divergence_by_cut(total_error(own, freer))
        found.append(Constraint(name, value, max(expected - without, 0.0)))
    return tuple(found)
