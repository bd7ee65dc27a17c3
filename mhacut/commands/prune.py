"""``mhacut prune``: read, calibrate; plan, cut, recover and measure until all targets are met; write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.commands.prune_attempt import CHECK_IMAGES, TIMING_SECONDS, Attempt
from mhacut.commands.prune_folder import read_folder
from mhacut.commands.prune_inputs import PruneInputs, SlimFile, Source, read_inputs
from mhacut.commands.prune_latency import Latency
from mhacut.commands.prune_result import PruneResult, PruneResults, advice
from mhacut.commands.prune_targets import (
    Flops,
    MaxDrop,
    MaxKL,
    Params,
    Size,
    Targets,
    meet_budgets,
    smallest_within_loss,
)
from mhacut.data import ImagesInMemory
from mhacut.errors import MhacutError, UsageError, option_name
from mhacut.measuring.accuracy import Fidelity, ModelFigures
from mhacut.options.base import IN_MEMORY, PathLike
from mhacut.options.option import takes_keywords
from mhacut.options.prune import PruneOptions
from mhacut.pruning.check import same_outputs
from mhacut.pruning.planner import Planned, Planner
from mhacut.report.page import write_overview, write_report
from mhacut.runtime.device import default_torch
from mhacut.runtime.distributed import gathered
from mhacut.runtime.files import show
from mhacut.runtime.process import world_size
from mhacut.runtime.progress import SILENT, Reporter, Reporting, StageTimer, reporting
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.flops import count_parameters

TARGETS = (Flops, Params, Size, Latency, MaxKL, MaxDrop)
"""Target classes, 1 for each option that sets a target."""


@dataclass(frozen=True)
class _Call(Reporting, PruneOptions):
    checkpoint: PathLike | nn.Module  # type: ignore[assignment]  # wider than the command's
    _: KW_ONLY
    flops: str | float | None = None  # type: ignore[assignment]
    images: ImagesInMemory | None = None
    val_images: ImagesInMemory | None = None


@dataclass(frozen=True)
class _CallMany(Reporting, PruneOptions):
    checkpoint: PathLike | nn.Module  # type: ignore[assignment]  # wider than the command's
    _: KW_ONLY
    flops: Sequence[str | float] = field()  # type: ignore[assignment]  # without the default
    images: ImagesInMemory | None = None
    val_images: ImagesInMemory | None = None


@default_torch()
@takes_keywords(_Call)
def prune(
    checkpoint: PathLike | nn.Module,
    *,
    flops: str | float | None = None,
    images: ImagesInMemory | None = None,
    val_images: ImagesInMemory | None = None,
    progress: bool | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> PruneResult:
    """Prune a model to a budget or a bound on the loss, and write a slim safetensors file.

        result = mhacut.prune(model, flops="50%", images=(images, labels))
        slim = result.model()

    Args:
        checkpoint: ``.safetensors``, ``.pth``, a timm folder, a slim file, ``timm:NAME``, or a dense timm
            module. A module is copied. ``model_args`` states arguments that the module's weights do not
            show, such as ``num_heads``. Modules of :func:`load_model` need no ``model_args``.
        flops: budget: ``2.0G``, ``600M``, ``2e9`` (multiply-accumulates) or ``50%`` of the dense FLOPs.
            ``params``, ``size`` and ``max_latency`` are further budgets. ``max_kl`` or ``max_drop`` bound
            the loss instead of a budget. For several budgets of FLOPs, see :func:`prune_many`.
        images: images in memory instead of ``data_dir``, normalised as the model expects: float
            [N, C, H, W]; a tuple of images and labels, int [N]; or a shuffled ``DataLoader`` or iterable of
            such batches, which is read until there are enough images.
        val_images: validation images, in the same forms as ``images``, to compare the slim model with the
            dense model. Default: images of ``images`` that were not used to calibrate, if they have labels.
            If the dense model was trained on these images, their accuracy is too high.
        progress: show a progress bar. Default: in notebooks and terminals.
        reporter: receives progress and messages instead of a bar.
        options: options of the command line, listed below by ``help()``.

    Under torchrun, every process makes the same call and calibrates on its share of the images. Process 0
    searches and writes. All processes return the same result.

    Raises:
        MhacutError: a subclass in :mod:`mhacut.errors`. Nothing was written.
    """
    if isinstance(flops, tuple | list):
        raise UsageError(
            f"{option_name('flops', flops)}: expected 1 budget. For several budgets, call mhacut.prune_many"
        )
    with reporting(reporter, progress) as shown:
        (result,) = _prune_all(
            checkpoint, None if flops is None else str(flops), shown, images, val_images, options
        )
    return result


@default_torch()
@takes_keywords(_CallMany)
def prune_many(
    checkpoint: PathLike | nn.Module,
    *,
    flops: Sequence[str | float],
    images: ImagesInMemory | None = None,
    val_images: ImagesInMemory | None = None,
    progress: bool | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> PruneResults:
    """Prune a model to several budgets of FLOPs with one calibration, and write 1 file per budget.

    The files are the same as from :func:`prune`. All budgets share the calibration, the sensitivity curves
    and the dense model's logits. The result is a tuple, which notebooks show as a table and charts.

    Args:
        checkpoint: the same as for :func:`prune`.
        flops: different budgets, such as ``["70%", "50%"]``.
        images: the same as for :func:`prune`.
        val_images: the same as for :func:`prune`.
        progress: show a progress bar. Default: in notebooks and terminals.
        reporter: receives progress and messages instead of a bar.
        options: options of the command line. ``{}`` in the name of ``output`` becomes the budget (``50pct``).

    Raises:
        MhacutError: a subclass in :mod:`mhacut.errors`. Files of earlier budgets may have been written.
    """
    budgets = () if isinstance(flops, str) or not isinstance(flops, Iterable) else tuple(map(str, flops))
    if not budgets:
        raise UsageError(f"{option_name('flops', flops)}: expected a list of budgets, such as ['70%', '50%']")
    with reporting(reporter, progress) as shown:
        return PruneResults(_prune_all(checkpoint, budgets, shown, images, val_images, options))


def _prune_all(
    checkpoint: PathLike | nn.Module,
    flops: str | tuple[str, ...] | None,
    reporter: Reporter,
    images: ImagesInMemory | None,
    val_images: ImagesInMemory | None,
    options: Mapping[str, Any],
) -> tuple[PruneResult, ...]:
    module = checkpoint if isinstance(checkpoint, nn.Module) else None
    path = IN_MEMORY if isinstance(checkpoint, nn.Module) else checkpoint
    parsed = PruneOptions.of(checkpoint=path, flops=flops, **options)
    return run_prune(parsed, reporter, module, images, val_images)


def run_prune(
    options: PruneOptions,
    reporter: Reporter,
    module: nn.Module | None = None,
    images: ImagesInMemory | None = None,
    val_images: ImagesInMemory | None = None,
) -> tuple[PruneResult, ...]:
    folder = options.as_ == "huggingface"
    if folder and world_size() > 1:
        kind = option_name("as_", options.as_)
        raise UsageError(f"{kind}: expected 1 process, found {world_size()}. Run without torchrun")
    with gathered(options.device) as processes:
        timer = StageTimer(reporter if processes.first else SILENT)
        with processes.fail_together():
            inputs: tuple[PruneInputs, ...]  # 1. read
            if folder:
                inputs = (read_folder(options, processes, timer, images, val_images),)
            else:
                inputs = read_inputs(options, processes, timer, module, images, val_images)
            files = [Targets(of_file, TARGETS) for of_file in inputs]
            inputs[0].validation.dense_predictions()  # minutes of work: targets are checked before
        shared = len(files) > 1 or options.bounds_loss
        job = replace(inputs[0].job, teacher_cache=[] if shared else None)
        calibration = job.calibrate(processes)  # 2. calibrate

        def in_first_process() -> tuple[PruneResult, ...]:
            planner = Planner(job, calibration)
            results = tuple(_prune_to(targets, planner, timer) for targets in files)
            if options.report is not None and options.several:
                source, budgets = inputs[0].checkpoint, PruneResults(results)
                prunable = find_prunable_layers(source.model)
                verdict = [line for result in budgets for line in result.verdict_lines()]
                choices = budgets.choices()
                write_overview(options, source.loaded, prunable, choices, source.provenance, verdict)
            return results

        return processes.from_first(in_first_process)


def _prune_to(targets: Targets, planner: Planner, timer: StageTimer) -> PruneResult:
    options, source = targets.inputs.options, targets.inputs.source
    meet = smallest_within_loss if options.bounds_loss else meet_budgets
    attempt = meet(targets, planner)  # 3. plan, 4. cut, 5. check, 6. recover
    slim, planned = source.slim(attempt, planner.job)
    result = _measure(targets, attempt, planned, slim, planner)  # 7. measure
    if not options.dry_run:
        timer.start("writing")  # 8. write
        result = _write(result, source, slim, Path(str(options.output)), overwrite=options.overwrite)
    result = replace(result, advice=advice(result, targets, attempt, planner))
    if options.report is not None:
        timer.start("reporting")
        result = replace(result, report=_write_report(result, targets.inputs))
    return replace(result, seconds=timer.taken())


def _measure(
    targets: Targets, attempt: Attempt, planned: Planned, slim: nn.Module, planner: Planner
) -> PruneResult:
    inputs, job = targets.inputs, planner.job
    options, source, validation = inputs.options, inputs.source, inputs.validation
    classifier = source.classifier(slim.to(job.device))
    predictions = attempt.predictions(validation, classifier)
    job.reporter.start("comparing")
    held_out = job.held_out(planner.calibration)
    metric = held_out.preserved.metric
    if predictions is not None and metric == "answers":
        fidelity = validation.fidelity(predictions)
    else:
        sample = f"held-out {'synthetic ' if source.images.synthetic else ''}images"
        divergence, agreement = held_out.divergence_and_agreement(attempt.model.to(job.device))
        fidelity = Fidelity(divergence, agreement, len(held_out.images), sample)
    latency = next((target for target in attempt.reached if target.name == "max_latency"), None)
    dense_ms = slim_ms = None
    if latency is not None:
        dense_ms, slim_ms = latency.measured["dense"], latency.reached
    elif options.latency:
        job.reporter.start("timing")
        dense_ms, slim_ms = source.stopwatch.compare([classifier], seconds=TIMING_SECONDS).wall
    slim = slim.cpu()
    before = validation.dense_predictions().evaluation
    after = None if predictions is None else predictions.evaluation
    flops, budget = attempt.planned.flops, attempt.flops_limit
    record = inputs.record(planned.plan, planned.curves, flops, budget, after, fidelity, attempt.reached)
    output = source.output(record, inputs.dtypes)
    size = output.size(slim)
    return PruneResult(
        output=None,
        architecture=source.name,
        plan=planned.plan,
        budget=job.table.dense if budget is None else budget,
        dense=ModelFigures(job.table.dense, count_parameters(source.model), dense_ms, before, source.size()),
        slim=ModelFigures(flops, count_parameters(slim), slim_ms, after, size),
        data=source.images.description,
        preprocessing=source.preprocessing,
        provenance=source.provenance,
        not_prunable=job.prunable.not_prunable,
        repairs=planned.ready.repairs,
        device=str(job.device),
        latency_batch_size=options.latency_batch_size,
        timing={} if slim_ms is None else source.stopwatch.conditions(),
        log=planned.log,
        curves=planned.curves,
        fidelity=fidelity,
        preserved=source.preserved(held_out.preserved),
        metric=metric,
        targets=tuple(target.with_size(size) for target in attempt.reached),
        _model=slim,
        _files=output,
    )


@torch.no_grad()
def _write(
    result: PruneResult, source: Source, slim: nn.Module, target: Path, *, overwrite: bool
) -> PruneResult:
    """Write the slim model, then check the outputs of the written model.

    Return the result with the file size.
    """
    output, reloaded = result.files, list[nn.Module]()

    def check(path: Path) -> None:
        output.complete(path, result.rows())
        reloaded.append(output.open(path))
        images = source.images.images[:CHECK_IMAGES]
        if not same_outputs(source.classifier(reloaded[0]), source.classifier(slim), images):
            raise MhacutError(
                f"{show(target)}: outputs of the file differ from those of the model in memory; nothing was "
                "written. This is a bug in mhacut. Please report the architecture and its arguments"
            )

    output.write(target, slim, overwrite=overwrite, check=check)
    size = target.stat().st_size if target.is_file() else result.slim.size
    targets = tuple(met.with_size(size or 0) for met in result.targets)
    figures = replace(result.slim, size=size)
    return replace(result, output=target, slim=figures, targets=targets, _model=reloaded[0])


def _write_report(result: PruneResult, inputs: PruneInputs) -> Path:
    options, source, output = inputs.options, inputs.checkpoint, result.files
    assert isinstance(output, SlimFile)
    slim = result.model()
    where = f"{options.output} (dry run)" if options.dry_run else str(options.output)
    identity, record = source.loaded.identity, output.record
    pruned = Checkpoint.of_model(
        slim.to(inputs.job.device), identity, source=where, record=record, dtypes=output.dtypes
    )
    return write_report(
        options,
        source.loaded,
        pruned,
        (inputs.job.prunable, find_prunable_layers(slim)),
        source.images,
        result.figures(),
        source.provenance,
        [*result.verdict_lines(), *(target.text for target in result.targets)],
    )
