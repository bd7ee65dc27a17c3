"""Time of the files of ``mhacut prune``: measured, corrected and compared with their budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from mhacut.commands.prune_cut import Correction, CutModel
from mhacut.commands.prune_files import write_checked
from mhacut.commands.prune_inputs import PruneInputs
from mhacut.commands.prune_latency import TimedCut
from mhacut.commands.prune_record import slim_record
from mhacut.commands.prune_targets import Reached
from mhacut.errors import OutputError
from mhacut.runtime.files import show, temporary_folder
from mhacut.runtime.progress import Reporter


def time_file(inputs: PruneInputs, found: CutModel, reporter: Reporter) -> TimedCut | None:
    """Time the model, as read from a file, in turns with the dense one; twice if it misses its budget.

    The file is temporary: a model that misses its budget never gets the output's name.

    Returns:
        None without a budget of time.
    """
    target = inputs.time_target
    if target is None:
        return None
    slim = found.model if inputs.options.dry_run else _reloaded(inputs, found, reporter)
    target.stopwatch.start("timing")
    record = slim_record(inputs, found.planned, found.flops)
    timed = target.time(slim, record)
    if timed.nanoseconds <= timed.most:
        return timed
    again = target.time(slim, record)
    return timed if timed.fresh and not again.fresh else again


def _reloaded(inputs: PruneInputs, found: CutModel, reporter: Reporter) -> nn.Module:
    """Return the model that was cut, written to a temporary file beside the slim file and read again."""
    reporter.start("writing")
    try:
        with temporary_folder(inputs.target) as folder:
            draft = replace(inputs, budget=found.budget, target=folder / inputs.target.name)
            slim, _ = write_checked(draft, found.model, slim_record(draft, found.planned, found.flops))
            return slim
    except OSError as error:
        raise OutputError(f"{show(inputs.target)}: cannot be written: {error.strerror or error}") from error


def with_less_time(inputs: PruneInputs, found: CutModel, missed: TimedCut) -> Correction:
    """Return the correction for the next plan, after a model that misses its time when read from a file.

    Args:
        inputs: with the limits of the file.
        found: the model.
        missed: its time.
    """
    limits = []
    for asked, limit in zip(inputs.storage, found.correction.limits, strict=True):
        late = limit.resource == "max_latency"
        limits.append(found.planned.corrected(limit, asked, missed.nanoseconds) if late else limit)
    return replace(found.correction, limits=tuple(limits))


def reached_time(inputs: PruneInputs, found: CutModel, timed: TimedCut) -> Reached:
    """Return the budget of time, and what was reached, in milliseconds.

    Args:
        inputs: with the limits of the file.
        found: the model that was cut.
        timed: the model in the file.
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
            "predicted": target.foreseen(found.planned) / 1e6,
            "dense": timed.dense / 1e6,
            "wall": timed.wall_ms,
            "corrections": found.corrections,
            **conditions,
        },
    )
