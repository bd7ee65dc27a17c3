"""Files of ``mhacut prune`` beside their budget of time: measured, corrected, and what was reached."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from mhacut.commands.prune_cut import CutModel
from mhacut.commands.prune_inputs import PruneInputs
from mhacut.commands.prune_latency import AIM, TimedCut
from mhacut.commands.prune_targets import Reached
from mhacut.errors import BudgetError
from mhacut.pruning.limits import Limit
from mhacut.runtime.progress import Reporter


def time_file(inputs: PruneInputs, found: CutModel, slim: nn.Module, reporter: Reporter) -> TimedCut | None:
    """Time the model in the file in turns with the dense one, once more if it misses its budget.

    Returns:
        None without a budget of time.
    """
    target = inputs.time_target
    if target is None:
        return None
    reporter.start("timing")
    expected = target.foreseen(found.planned.plan.widths())
    timed = target.time(slim, expected)
    return timed if timed.nanoseconds <= timed.most else target.time(slim, expected)


def with_less_time(inputs: PruneInputs, missed: TimedCut) -> PruneInputs:
    """Return the inputs with a limit on time that makes up for a file that missed it, to write it anew."""

    def corrected(limit: Limit) -> Limit:
        if limit.resource != "max_latency":
            return limit
        return replace(limit, most=int(limit.most * AIM * missed.most / missed.nanoseconds))

    job = replace(inputs.job, storage=tuple(map(corrected, inputs.job.storage)))
    return replace(inputs, job=job, options=replace(inputs.options, overwrite=True))


def missed_by_file(inputs: PruneInputs) -> BudgetError:
    """Return the error that states by how much the file missed its budget of time."""
    assert inputs.time_target is not None
    missed = inputs.time_target.missed()
    return missed if inputs.options.dry_run else BudgetError(f"{missed}. {inputs.target} was written")


def reached_time(inputs: PruneInputs, found: CutModel, timed: TimedCut, rewritten: int) -> Reached:
    """Return the budget of time, and what was reached, in milliseconds.

    Args:
        inputs: with the limits of the file.
        found: the model that was cut.
        timed: the model in the file.
        rewritten: number of files before this one.
    """
    target = inputs.time_target
    assert target is not None
    conditions: dict[str, Any] = target.stopwatch.conditions()
    return Reached(
        "max_latency",
        target.budget.text,
        timed.most / 1e6,
        timed.nanoseconds / 1e6,
        measured={
            "predicted": target.foreseen(found.planned.plan.widths()) / 1e6,
            "dense": timed.dense / 1e6,
            "wall": timed.wall_ms,
            "corrections": found.corrections + rewritten,
            **conditions,
        },
    )
