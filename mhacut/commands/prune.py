"""``mhacut prune`` as a function: read, calibrate, plan, cut, check, recover, write, measure, report."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.record import SlimRecord
from mhacut.commands.prune_calibration import calibrated
from mhacut.commands.prune_cut import CutModel, cut_to_budget, cut_within_bound
from mhacut.commands.prune_files import Measured, final_record, finish_file, measure, write_checked
from mhacut.commands.prune_inputs import PruneInputs, read_inputs
from mhacut.commands.prune_latency import CORRECTIONS
from mhacut.commands.prune_record import slim_record
from mhacut.commands.prune_result import PruneResult, PruneResults, choices_of, equal_models
from mhacut.commands.prune_targets import target_figure
from mhacut.commands.prune_timing import reached_time, time_file, with_less_time
from mhacut.data import ImagesInMemory
from mhacut.errors import DataError, UsageError, option_name
from mhacut.options.base import IN_MEMORY, PathLike
from mhacut.options.option import takes_keywords
from mhacut.options.prune import PruneKeywords, PruneOptions
from mhacut.pruning.planner import Planned, Planner
from mhacut.report.page import measured_figures, write_overview, write_report
from mhacut.runtime.device import with_default_torch
from mhacut.runtime.distributed import Processes, gathered
from mhacut.runtime.progress import SILENT, Reporter, StageTimer, reporting
from mhacut.surgery.find import find_prunable_layers


@dataclass(frozen=True)
class _Call(PruneKeywords):
    checkpoint: PathLike | nn.Module
    _: KW_ONLY
    flops: str | float | None = None
    images: ImagesInMemory | None = None
    progress: bool | None = None
    reporter: Reporter | None = None


@dataclass(frozen=True)
class _CallMany(PruneKeywords):
    checkpoint: PathLike | nn.Module
    _: KW_ONLY
    flops: Sequence[str | float]
    images: ImagesInMemory | None = None
    progress: bool | None = None
    reporter: Reporter | None = None


@with_default_torch
@takes_keywords(_Call)
def prune(
    checkpoint: PathLike | nn.Module,
    *,
    flops: str | float | None = None,
    images: ImagesInMemory | None = None,
    progress: bool | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> PruneResult:
    """Cut ``checkpoint`` down to its targets and write a slim safetensors file.

        result = mhacut.prune(model, flops="50%", images=(images, labels))
        slim = result.model()

    Args:
        checkpoint: ``.safetensors``, ``.pth``, a timm folder, a slim file, ``timm:NAME``, or a dense timm
            module, which is copied. For a module, ``model_args`` states arguments that its weights do not
            show, such as ``num_heads``; one of :func:`load_model` needs none.
        flops: ``2.0G``, ``600M``, ``2e9`` or ``50%``; one FLOP is one multiply-accumulate. ``params``,
            ``size``, ``max_latency``, ``max_kl`` or ``max_drop`` can replace it; the first three can also be
            combined with it. For several budgets of FLOPs, see :func:`prune_many`.
        images: in place of ``data_dir``, images in memory, normalised as the model expects: float
            [N, C, H, W]; a tuple of images and labels, int [N]; or a shuffled ``DataLoader``, or any
            iterable, of such batches, which is read until there are enough images. With labels, accuracy is
            measured on images that were not used to calibrate.
        progress: whether to show a bar; by default in notebooks and on terminals.
        reporter: receives progress and messages, in place of a bar.
        options: options of the command line; ``help()`` lists them below.

    Under torchrun, every process makes the same call and calibrates on its share of the images; the first
    process then searches and writes, and all return the same result.

    Raises:
        MhacutError: one of its kinds, in :mod:`mhacut.errors`; nothing was written.
    """
    if isinstance(flops, tuple | list):
        raise UsageError(f"{option_name('flops', flops)}: expected one budget; several are for prune_many")
    with reporting(reporter, progress) as shown:
        (result,) = _prune_all(checkpoint, None if flops is None else str(flops), shown, images, options)
    return result


@with_default_torch
@takes_keywords(_CallMany)
def prune_many(
    checkpoint: PathLike | nn.Module,
    *,
    flops: Sequence[str | float],
    images: ImagesInMemory | None = None,
    progress: bool | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> PruneResults:
    """Cut ``checkpoint`` down to each of several budgets, with one calibration; write a file for each.

    The files are those that :func:`prune` would write. Calibration and curves are shared; planning, repair,
    healing and measuring are repeated for each budget. The result is a tuple, which notebooks show as a table
    and charts.

    Args:
        checkpoint: as :func:`prune` takes it.
        flops: budgets, all different.
        images: as :func:`prune` takes them.
        progress: whether to show a bar; by default in notebooks and on terminals.
        reporter: receives progress and messages, in place of a bar.
        options: those of the command line; ``{}`` in the name of ``output`` becomes the budget (``50pct``).

    Raises:
        MhacutError: as :func:`prune`; files of earlier budgets may have been written.
    """
    budgets = () if isinstance(flops, str) or not isinstance(flops, Iterable) else tuple(map(str, flops))
    if not budgets:
        raise UsageError(f"{option_name('flops', flops)}: expected one or more budgets in a list")
    with reporting(reporter, progress) as shown:
        return PruneResults(_prune_all(checkpoint, budgets, shown, images, options))


def _prune_all(
    checkpoint: PathLike | nn.Module,
    flops: str | tuple[str, ...] | None,
    reporter: Reporter,
    images: ImagesInMemory | None,
    options: Mapping[str, Any],
) -> tuple[PruneResult, ...]:
    module = checkpoint if isinstance(checkpoint, nn.Module) else None
    read = IN_MEMORY if isinstance(checkpoint, nn.Module) else checkpoint
    budgets = ("params", "size", "max_latency")
    amounts = {name: str(options[name]) for name in budgets if options.get(name) is not None}
    given = PruneOptions.from_flat(checkpoint=read, flops=flops, **{**options, **amounts})
    return run_prune(given, reporter, module, images)


def run_prune(
    options: PruneOptions,
    reporter: Reporter,
    module: nn.Module | None = None,
    images: ImagesInMemory | None = None,
) -> tuple[PruneResult, ...]:
    """Run the nine stages of ``mhacut prune``, on a copy of ``module`` if there is no checkpoint.

    Returns:
        The results of each budget, in their order. What does not depend on budgets is done once.
    """
    with gathered(options.device) as processes:
        timer = StageTimer(reporter if processes.first else SILENT)
        with processes.together():
            series = read_inputs(options, processes, timer, module, images)  # 1. read
        if images is not None:
            _check_same_images(series[0].job.images, processes)
        kept = None if options.calibration is None else Path(options.calibration)
        calibration = calibrated(series[0].job, kept, processes)  # 2. calibrate
        made: list[nn.Module] = []

        def in_first_process() -> tuple[PruneResult, ...]:
            planner = Planner(series[0].job, calibration)
            written = _timed([_prune_to(inputs, planner, timer) for inputs in series])
            results = tuple(_finished(one, timer) for one in written)
            for line in equal_models(results):
                timer.log(line)
            if options.report is not None and options.several:
                dense, shared = series[0].loaded, series[0]
                prunable = find_prunable_layers(dense.model)
                write_overview(options, dense, prunable, choices_of(results), shared.provenance)
            made.extend(one.slim.cpu() for one in written)
            return results

        results = processes.from_first(in_first_process)
        # The models stay where they are: other processes find them in the files.
        return tuple(
            replace(result, _model=made[number]) if made else result for number, result in enumerate(results)
        )


def _check_same_images(images: Tensor, processes: Processes) -> None:
    """Raise a :class:`DataError` unless all processes were given the same images in memory."""
    if processes.size > 1:
        digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
        if len(processes.union([digest])) > 1:
            raise DataError(
                "images: processes share them, but were given different ones; give all the same images in "
                "the same order"
            )


_SECONDS = 3.0
"""Time to measure latency in, after the warm-up."""


@dataclass(frozen=True)
class _Written:
    """One file that was written and measured."""

    inputs: PruneInputs
    """Inputs, with the limits that the model was cut to."""
    found: CutModel
    slim: nn.Module
    """The model in the file, or after a dry run in memory."""
    measured: Measured
    record: SlimRecord
    seconds: Mapping[str, float]
    """Seconds of the stages before the measurement, by name."""
    measuring: Mapping[str, float]
    """Seconds of the measurement, by what is measured."""


def _prune_to(inputs: PruneInputs, planner: Planner, timer: StageTimer) -> _Written:
    """Run the stages of one file, up to what is measured on it alone.

    Raises:
        BudgetError: the model takes more time than it may, corrected several times; no file was written.
    """
    after = None
    while True:  # 3. plan, 4. cut, 5. check, 6. recover
        bounds = inputs.options.bounds_loss
        found = cut_within_bound(inputs, planner, timer) if bounds else cut_to_budget(inputs, planner, after)
        timed = time_file(inputs, found, timer)
        if timed is None or timed.nanoseconds <= timed.most:
            break
        if found.correction.plans > CORRECTIONS:
            assert inputs.time_target is not None
            raise inputs.time_target.missed()
        after = with_less_time(inputs, found, timed)
    inputs, slim = replace(inputs, budget=found.budget), found.model
    if not inputs.options.dry_run:
        timer.start("writing")
        record = slim_record(inputs, found.planned, found.flops)
        slim, written = write_checked(inputs, slim, record)  # 7. write
    seconds = timer.taken()
    measured = measure(inputs, planner.calibration, slim, found, timer)  # 8. measure
    if timed is not None:
        measured = measured.with_time(timed, reached_time(inputs, found, timed))
    record, measured = final_record(inputs, found, slim, measured)
    if not inputs.options.dry_run:
        timer.start("writing")
        stated = slim_record(inputs, found.planned, found.flops)
        written = finish_file(inputs, slim, record, stated, written)
        measured = measured.with_size(written.st_size, inputs)
    return _Written(inputs, found, slim, measured, record, seconds, timer.taken())


def _timed(written: Sequence[_Written]) -> list[_Written]:
    """Measure latency, where that is asked for: all models take turns with the dense one."""
    shared = written[0].inputs
    if not shared.options.timing.latency or shared.time_target is not None:  # it timed them one by one
        return list(written)
    shared.stopwatch.start("timing")
    dense, *times = shared.stopwatch.beside([one.slim for one in written], seconds=_SECONDS).wall
    return [
        replace(one, measured=one.measured.with_latency(dense, own))
        for one, own in zip(written, times, strict=True)
    ]


def _finished(one: _Written, timer: StageTimer) -> PruneResult:
    """Write the page about one file, where that is asked for, and return the result."""
    page = None
    shared = timer.taken()
    if one.inputs.options.report is not None:
        timer.start("reporting")
        page = _report(one)  # 9. report
    own = timer.taken()
    measuring = sum(one.measuring.values()) + sum(shared.values())
    seconds = {**one.seconds, "measuring": measuring, **own}
    stages: dict[str, float] = {}
    for part in (one.seconds, one.measuring, shared, own):
        for stage, taken in part.items():
            stages[stage] = stages.get(stage, 0.0) + taken
    return _result(one.inputs, one.found.planned, one.measured, (seconds, stages), page)


def _report(one: _Written) -> Path:
    """Write the page about the run."""
    inputs, found, measured = one.inputs, one.found, one.measured
    options, dense, target = inputs.options, inputs.loaded, inputs.target
    pruned = Checkpoint.of_model(
        one.slim,
        dense.identity,
        source=f"{target} (dry run)" if options.dry_run else str(target),
        record=one.record,
        dtypes=inputs.dtypes,
    )
    figures = measured_figures(measured.dense, measured.slim, inputs.stopwatch.conditions())
    figures += [target_figure(target) for target in measured.targets]
    both, log = (inputs.job.prunable, found.layers), found.planned.log
    return write_report(options, dense, pruned, both, inputs.images, log, figures, inputs.provenance)


def _result(
    inputs: PruneInputs,
    planned: Planned,
    measured: Measured,
    seconds: tuple[Mapping[str, float], Mapping[str, float]],
    page: Path | None,
) -> PruneResult:
    return PruneResult(
        output=None if inputs.options.dry_run else inputs.target,
        architecture=inputs.loaded.identity.architecture,
        plan=planned.plan,
        budget=inputs.budget,
        dense=measured.dense,
        slim=measured.slim,
        data=inputs.images.description,
        preprocessing=inputs.preprocessing,
        provenance=inputs.provenance,
        not_prunable=inputs.job.prunable.not_prunable,
        repairs=planned.ready.repairs,
        device=str(inputs.job.device),
        latency_batch_size=inputs.options.timing.latency_batch_size,
        timing={} if measured.slim.latency_ms is None else inputs.stopwatch.conditions(),
        seconds=seconds[0],
        stage_seconds=seconds[1],
        log=planned.log,
        curves=planned.curves,
        report=page,
        divergence=measured.divergence,
        preserved=measured.preserved.to_json(),
        divergence_of=measured.preserved.measure,
        judged_on=measured.judged_on,
        divergence_with_tokens=measured.divergence_with_tokens,
        targets=measured.targets,
        constraints=planned.constraints,
    )
