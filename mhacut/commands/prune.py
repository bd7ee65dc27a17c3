"""``mhacut prune``: read, calibrate; plan, cut, recover and measure until all targets are met; write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mhacut.budget import format_amount
from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.load import load_model
from mhacut.checkpoint.record import SlimRecord
from mhacut.checkpoint.write import file_size, write_slim
from mhacut.commands.prune_attempt import (
    CHECK_IMAGES,
    TIMING_SECONDS,
    Attempt,
    TargetResult,
)
from mhacut.commands.prune_folder import prune_folder
from mhacut.commands.prune_inputs import PruneInputs, read_inputs
from mhacut.commands.prune_latency import Latency
from mhacut.commands.prune_result import PruneResult, PruneResults, advice, choices_of
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
from mhacut.options.prune import BUDGETS, PruneKeywords, PruneOptions
from mhacut.pruning.check import same_outputs
from mhacut.pruning.planner import Planner
from mhacut.report.page import write_overview, write_report
from mhacut.runtime.device import default_torch
from mhacut.runtime.distributed import gathered
from mhacut.runtime.files import show
from mhacut.runtime.progress import SILENT, Reporter, Reporting, StageTimer, reporting
from mhacut.surgery.costs import count_bytes
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.flops import count_parameters

TARGETS = (Flops, Params, Size, Latency, MaxKL, MaxDrop)
"""Target classes. The option of a target has the name of the class."""


@dataclass(frozen=True)
class _Call(Reporting, PruneKeywords):
    checkpoint: PathLike | nn.Module
    _: KW_ONLY
    flops: str | float | None = None
    images: ImagesInMemory | None = None
    val_images: ImagesInMemory | None = None


@dataclass(frozen=True)
class _CallMany(Reporting, PruneKeywords):
    checkpoint: PathLike | nn.Module
    _: KW_ONLY
    flops: Sequence[str | float]
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
            iterable, of such batches, which is read until there are enough images.
        val_images: images to judge the result on, in the same forms: the accuracy, if they have labels, and
            how like the dense model's the answers are. Without them, both are measured on other images of
            ``images`` if these have labels, which flatters a model that was trained on them.
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
    """Cut ``checkpoint`` down to each of several budgets, with one calibration; write a file for each.

    The files are those that :func:`prune` would write. Calibration, curves and what tuning asks of the dense
    model are shared; all else is repeated for each budget. The result is a tuple, which notebooks show as a
    table and charts.

    Args:
        checkpoint: as :func:`prune` takes it.
        flops: budgets, all different.
        images: as :func:`prune` takes them.
        val_images: as :func:`prune` takes them.
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
    read = IN_MEMORY if isinstance(checkpoint, nn.Module) else checkpoint
    amounts = {name: str(options[name]) for name in BUDGETS[1:] if options.get(name) is not None}
    given = PruneOptions.of(checkpoint=read, flops=flops, **{**options, **amounts})
    return run_prune(given, reporter, module, images, val_images)


def run_prune(
    options: PruneOptions,
    reporter: Reporter,
    module: nn.Module | None = None,
    images: ImagesInMemory | None = None,
    val_images: ImagesInMemory | None = None,
) -> tuple[PruneResult, ...]:
    """Run ``mhacut prune``. A ``module`` is copied and replaces the checkpoint."""
    if options.as_ == "huggingface":
        return (prune_folder(options, reporter, images, val_images),)
    with gathered(options.device) as processes:
        timer = StageTimer(reporter if processes.first else SILENT)
        with processes.fail_together():
            inputs, *others = read_inputs(options, processes, timer, module, images, val_images)  # 1. read
            files = [Targets(one, TARGETS) for one in (inputs, *others)]
            inputs.validation.evaluate_dense()
        job = replace(inputs.job, teacher_cache=[] if others or options.bounds_loss else None)
        calibration = job.calibrate(processes)  # 2. calibrate
        models: list[nn.Module] = []

        def in_first_process() -> tuple[PruneResult, ...]:
            planner = Planner(job, calibration)
            results = []
            for targets in files:
                meet = smallest_within_loss if options.bounds_loss else meet_budgets
                attempt = meet(targets, planner)  # 3. to 6.
                result, model = _write(targets, attempt, planner, timer)  # 7. and 8.
                results.append(result)
                models.append(model)
            if options.report is not None and options.several:
                dense, prunable = inputs.loaded, find_prunable_layers(inputs.loaded.model)
                choices, warnings = choices_of(results), PruneResults(results).warnings()
                write_overview(options, dense, prunable, choices, inputs.provenance, warnings)
            return tuple(results)

        results = processes.from_first(in_first_process)
        # The other processes have no model: their results load the files.
        return tuple(replace(result, _model=model) for result, model in zip_longest(results, models))


def _write(
    targets: Targets, attempt: Attempt, planner: Planner, timer: StageTimer
) -> tuple[PruneResult, nn.Module]:
    """Measure the model, write its file and its report."""
    inputs, planned, slim = targets.inputs, attempt.planned, attempt.model
    options, loaded, job = inputs.options, inputs.loaded, inputs.job
    dense, slim = loaded.model, slim.to(job.device)
    answers = attempt.predictions or inputs.validation.predictions_of(slim)  # 7. measure
    evaluation = None if answers is None else answers.evaluation
    timer.start("comparing")
    held_out = job.held_out(planner.calibration)
    measure = held_out.preserved.metric
    if answers is not None and measure == "answers":
        fidelity = inputs.validation.fidelity(answers)
    else:
        sample = f"held-out {'synthetic ' if inputs.images.synthetic else ''}images"
        fidelity = Fidelity(*held_out.divergence_and_agreement(slim), len(held_out.images), sample)
    timed = next((one for one in attempt.reached if one.name == "max_latency"), None)
    times: tuple[float, ...] | tuple[None, None] = (None, None)
    if timed is not None:
        times = timed.measured["dense"], timed.reached
    elif options.latency:
        timer.start("timing")
        times = inputs.stopwatch.compare([slim], seconds=TIMING_SECONDS).wall
    slim = slim.cpu()

    budget = min((limit.most for limit in attempt.limits if limit.resource == "flops"), default=None)

    def record_of(reached: tuple[TargetResult, ...]) -> SlimRecord:
        lines = [one.to_json() for one in reached if options.flops is None or len(reached) > 1]
        return inputs.record(planned.plan, planned.curves, planned.flops, budget, evaluation, fidelity, lines)

    def with_size(size: int) -> tuple[TargetResult, ...]:
        shown = format_amount(size, "size")
        return tuple(
            replace(one, reached=size, labels=(one.labels[0], shown)) if one.name == "size" else one
            for one in attempt.reached
        )

    size = file_size(slim, record_of(attempt.reached), inputs.dtypes)
    record = record_of(with_size(size))  # which states a few bytes more than the file has
    if not options.dry_run:
        timer.start("writing")  # 8. write
        slim = _write_checked(inputs, slim, record)
        size = inputs.target.stat().st_size
    reached, dense_accuracy = with_size(size), inputs.validation.dense.evaluation
    parameters, dense_size = count_parameters(dense), count_bytes(dense, loaded.dtypes)
    before = ModelFigures(job.table.dense, parameters, times[0], dense_accuracy, dense_size)
    after = ModelFigures(planned.flops, count_parameters(slim), times[1], evaluation, size)
    conditions = inputs.stopwatch.conditions()
    result = PruneResult(
        output=None if options.dry_run else inputs.target,
        architecture=loaded.identity.architecture,
        plan=planned.plan,
        budget=job.table.dense if budget is None else budget,
        dense=before,
        slim=after,
        data=inputs.images.description,
        preprocessing=inputs.preprocessing,
        provenance=inputs.provenance,
        not_prunable=job.prunable.not_prunable,
        repairs=planned.ready.repairs,
        device=str(job.device),
        latency_batch_size=options.latency_batch_size,
        timing={} if after.latency_ms is None else conditions,
        log=planned.log,
        curves=planned.curves,
        fidelity=fidelity,
        preserved=held_out.preserved.to_json(),
        metric=measure,
        targets=reached,
        constraints=planned.constraints,
        _write=partial(write_slim, record=record, dtypes=inputs.dtypes, input_path=loaded.path),
    )
    result.advice = advice(result, targets, attempt, planner)
    if options.report is not None:
        timer.start("reporting")
        pruned = Checkpoint.of_model(
            slim.to(job.device),
            loaded.identity,
            source=f"{inputs.target} (dry run)" if options.dry_run else str(inputs.target),
            record=record,
            dtypes=inputs.dtypes,
        )
        figures = [row[:3] for row in result.rows() if row[0].startswith(("top-1", "latency"))]
        figures.append(("file", format_amount(dense_size, "size"), format_amount(size, "size")))
        for one in reached:
            figures.append((f"target {one.name} {one.spec}", f"at most {one.labels[0]}", one.labels[1]))
        both = job.prunable, find_prunable_layers(slim)
        likeness = fidelity if measure == "answers" else None
        origins, verdict = inputs.provenance, result.verdict_lines()
        result.report = write_report(
            options, loaded, pruned, both, inputs.images, figures, likeness, origins, verdict
        )
    result.seconds = timer.taken()
    return result, slim.cpu()


@torch.no_grad()
def _write_checked(inputs: PruneInputs, slim: nn.Module, record: SlimRecord) -> nn.Module:
    """Write the slim file, read it back, and compare the outputs. Return the model from the file."""
    target, reloaded = inputs.target, list[nn.Module]()

    def check(file: Path) -> None:
        reloaded.append(load_model(file))
        if not same_outputs(reloaded[0], slim, inputs.images.images[:CHECK_IMAGES]):
            raise MhacutError(
                f"{show(target)}: outputs of the file differ from those of the model in memory; no file was "
                "written. This is a bug in mhacut. Please report the architecture and its arguments"
            )

    write_slim(
        target,
        slim,
        record,
        dtypes=inputs.dtypes,
        overwrite=inputs.options.overwrite,
        input_path=inputs.loaded.path,
        check=check,
    )
    return reloaded[0]
