"""Stages 7 and 8 of ``mhacut prune``: write the slim file, and measure what is in it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from mhacut.budget import RESOURCES
from mhacut.checkpoint.load import load_model
from mhacut.checkpoint.record import SlimRecord
from mhacut.checkpoint.write import file_size, write_slim
from mhacut.commands.prune_cut import PROBED, CutModel
from mhacut.commands.prune_inputs import PruneInputs
from mhacut.commands.prune_latency import TimedCut
from mhacut.commands.prune_record import slim_record
from mhacut.commands.prune_result import MUCH
from mhacut.commands.prune_targets import Reached, reached_budgets
from mhacut.errors import MhacutError, OutputError
from mhacut.measuring.accuracy import evaluate
from mhacut.measuring.figures import ModelFigures
from mhacut.pruning.calibrate import Calibration
from mhacut.pruning.check import same_outputs
from mhacut.pruning.choose_merges import divergence_by_merging
from mhacut.pruning.preserve import Preserved
from mhacut.runtime.files import show
from mhacut.runtime.progress import Reporter
from mhacut.surgery.costs import count_bytes, round_to_stored
from mhacut.surgery.flops import count_parameters


@torch.no_grad()
def write_checked(
    inputs: PruneInputs, slim: nn.Module, record: SlimRecord
) -> tuple[nn.Module, os.stat_result]:
    """Write the slim file if the model in it is that in memory; return the former, and the file's status.

    What the file rounds is rounded in memory too.

    Raises:
        OutputError: the file cannot be written, or opened again.
        MhacutError: the model in it gives other outputs.
    """
    target, reloaded = inputs.target, list[nn.Module]()

    def check(file: Path) -> None:
        round_to_stored(slim, inputs.dtypes)
        try:
            reloaded.append(load_model(file))
        except MhacutError as error:
            raise OutputError(f"{show(target)}: what was written cannot be opened: {error}") from error
        if not same_outputs(reloaded[0], slim, inputs.images.images[:PROBED]):
            raise MhacutError(
                f"{show(target)}: the model in the file gives other outputs than the one in memory; nothing "
                "was written. This is a gap in mhacut: please report the architecture and its arguments"
            )

    written = write_slim(
        target,
        slim,
        record,
        dtypes=inputs.dtypes,
        overwrite=inputs.options.overwrite,
        input_path=inputs.loaded.path,
        check=check,
    )
    return reloaded[0], written


def final_record(
    inputs: PruneInputs, found: CutModel, slim: nn.Module, measured: Measured
) -> tuple[SlimRecord, Measured]:
    """Return the record with all that was measured, and the measurements with the size of the file with it.

    The size that the record states is that of the file, or a few bytes more.
    """

    def record(targets: Sequence[Reached]) -> SlimRecord:
        stated = () if inputs.options.flops is not None and len(targets) == 1 else targets
        return slim_record(inputs, found.planned, found.flops, measured.slim.evaluation, stated)

    nearly = measured.with_size(count_bytes(slim, inputs.dtypes), inputs)  # a number of as many digits
    measured = measured.with_size(file_size(slim, record(nearly.targets), inputs.dtypes), inputs)
    return record(measured.targets), measured


def finish_file(
    inputs: PruneInputs, slim: nn.Module, record: SlimRecord, stated: SlimRecord, written: os.stat_result
) -> os.stat_result:
    """Write the file again where it lacks what was measured; return its status.

    The first write makes sure that an interrupted measurement loses no file.

    Args:
        inputs: whose target is written.
        slim: the model.
        record: the record with the accuracy.
        stated: the record in the first file.
        written: status of the first file.

    Raises:
        OutputError: it cannot be written.
    """
    if record == stated:
        return written
    return write_slim(
        inputs.target,
        slim,
        record,
        dtypes=inputs.dtypes,
        overwrite=True,
        input_path=inputs.loaded.path,
    )


@dataclass(frozen=True)
class Measured:
    """Figures of one slim file, and of the dense model beside it."""

    dense: ModelFigures
    slim: ModelFigures
    divergence: float
    """Divergence of the slim model from the dense one, on held-out images."""
    preserved: Preserved
    """Outputs that the divergence is of."""
    judged_on: int
    """Number of held-out images."""
    divergence_with_tokens: float | None
    """Divergence that the same FLOPs would leave if tokens were merged; None if it is not far less."""
    targets: tuple[Reached, ...]

    def with_latency(self, dense: float, slim: float) -> Measured:
        """Return the same with the milliseconds per batch of both models."""
        return replace(
            self, dense=replace(self.dense, latency_ms=dense), slim=replace(self.slim, latency_ms=slim)
        )

    def with_size(self, size: int, inputs: PruneInputs) -> Measured:
        """Return the same with the file's size, and with the targets that are budgets."""
        slim = replace(self.slim, size=size)
        counted = reached_budgets(inputs, slim)
        measured = (target for target in self.targets if target.name not in RESOURCES or target.measured)
        return replace(self, slim=slim, targets=(*counted, *measured))

    def with_time(self, timed: TimedCut, target: Reached) -> Measured:
        """Return the same with the time of the file, and with the budget of time."""
        found = self.with_latency(timed.dense / 1e6, timed.nanoseconds / 1e6)
        return replace(found, targets=(*self.targets, target))


def measure(
    inputs: PruneInputs, calibration: Calibration, slim: nn.Module, found: CutModel, reporter: Reporter
) -> Measured:
    """Measure the slim model beside the dense one, but for the time that they take."""
    job, dense = inputs.job, inputs.loaded.model
    slim.to(job.device)
    evaluation = found.evaluation
    if evaluation is None and inputs.validation is not None:
        reporter.start("evaluating")
        evaluation = evaluate(slim, inputs.validation, device=job.device, progress=reporter.advance)
    reporter.start("comparing")
    judge = job.held_out(calibration)
    divergence = judge.divergence_of(slim)
    merging = None
    stored = any(inputs.targets[resource] is not None for resource in ("params", "size"))
    in_nats = judge.preserved.measure == "answers"
    if divergence > MUCH and in_nats and not job.merges_tokens and not stored:  # merging stores no less
        merging = divergence_by_merging(job, found.flops, calibration)
    size = count_bytes(dense, inputs.loaded.dtypes)
    before = ModelFigures(job.table.dense, count_parameters(dense), None, inputs.evaluation, size)
    after = ModelFigures(found.flops, count_parameters(slim), None, evaluation)
    return Measured(
        before,
        after,
        divergence,
        judge.preserved,
        len(judge.images),
        merging if merging is not None and merging < divergence / 2 else None,
        found.bounds,
    )
