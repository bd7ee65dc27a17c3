"""Files of ``mhacut prune`` beside their budget of time: measured, corrected, and what was reached."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from mhacut.commands.prune_cut import CutModel
from mhacut.commands.prune_files import write_checked
from mhacut.commands.prune_inputs import PruneInputs
from mhacut.commands.prune_latency import AIM, TimedCut
from mhacut.commands.prune_record import slim_record
from mhacut.commands.prune_targets import Reached
from mhacut.pruning.limits import Limit
from mhacut.runtime.files import temporary_folder
from mhacut.runtime.progress import Reporter


def time_file(inputs: PruneInputs, found: CutModel, reporter: Reporter) -> TimedCut | None:
    """Time the model, as it is read from a file, in turns with the dense one; twice if it misses its budget.

    The file is a temporary one: what misses its budget is never published, and replaces nothing.

    Returns:
        None without a budget of time.
    """
    target = inputs.time_target
    if target is None:
        return None
    slim = found.model if inputs.options.dry_run else _reloaded(inputs, found, reporter)
    target.stopwatch.start("timing")
    expected = target.foreseen(found.planned.plan.widths())
    timed = target.time(slim, expected)
    return timed if timed.nanoseconds <= timed.most else target.time(slim, expected)


def _reloaded(inputs: PruneInputs, found: CutModel, reporter: Reporter) -> nn.Module:
    """Return the model that was cut, written to a temporary file beside the slim file and read again."""
    reporter.start("writing")
    with temporary_folder(inputs.target) as folder:
        draft = replace(inputs, job=found.job, target=folder / inputs.target.name)
        return write_checked(draft, found.model, slim_record(draft, found.planned, found.flops))


def with_less_time(inputs: PruneInputs, missed: TimedCut) -> PruneInputs:
    """Return the inputs with a limit on time that makes up for a model that missed it."""

    def corrected(limit: Limit) -> Limit:
        if limit.resource != "max_latency":
            return limit
        return replace(limit, most=int(limit.most * AIM * missed.most / missed.nanoseconds))

    return replace(inputs, job=replace(inputs.job, storage=tuple(map(corrected, inputs.job.storage))))


def reached_time(inputs: PruneInputs, found: CutModel, timed: TimedCut, replanned: int) -> Reached:
    """Return the budget of time, and what was reached, in milliseconds.

    Args:
        inputs: with the limits of the file.
        found: the model that was cut.
        timed: the model in the file.
        replanned: number of models before this one that missed it once they were read from a file.
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
            "corrections": found.corrections + replanned,
            **conditions,
        },
    )
