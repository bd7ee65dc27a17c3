"""``mhacut prune`` as a function: read, calibrate, search, cut, check, write, measure."""

from __future__ import annotations

import copy
import math
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mhacut._version import __version__
from mhacut.budget import Budget, format_flops
from mhacut.checkpoint.load import LoadedModel, load_model, read_as_told
from mhacut.checkpoint.preprocessing import resolve_preprocessing
from mhacut.checkpoint.record import SlimRecord
from mhacut.checkpoint.write import write_slim
from mhacut.data import (
    CalibrationImages,
    EvaluationLoader,
    Preprocessing,
    calibration_images,
    evaluation_loader,
    has_split,
)
from mhacut.errors import BudgetError, MhacutError
from mhacut.measuring.accuracy import Evaluation, evaluate
from mhacut.measuring.latency import compare_latency
from mhacut.options.base import PathLike
from mhacut.options.prune import EFFORTS, PruneOptions, SearchOptions
from mhacut.plan import Plan, UnitKind
from mhacut.pruning.calibrate import Calibration, calibrate, held_out
from mhacut.pruning.compensation import Compensation
from mhacut.pruning.curves import Curve
from mhacut.pruning.distill import Distillation
from mhacut.pruning.indicators import SearchStep
from mhacut.pruning.planner import Planned, Planner
from mhacut.pruning.recover import finish
from mhacut.pruning.repair import UnitRepair
from mhacut.pruning.widths import lowest_flops, width_choices
from mhacut.report.prune_page import write_report
from mhacut.report.stored_curves import curves_to_json
from mhacut.runtime.device import warn_of_slow_amp
from mhacut.runtime.distributed import Processes, gathered
from mhacut.runtime.files import check_output
from mhacut.runtime.progress import Reporter, Silent
from mhacut.surgery.costs import CostTable, build_cost_table
from mhacut.surgery.find import PrunableLayers, UnitKey, find_prunable_layers
from mhacut.surgery.flops import count_parameters, measure_flops
from mhacut.surgery.info import classifier_size, gives_probabilities, not_prunable
from mhacut.surgery.mask import masked_tensors, run_with
from mhacut.surgery.slice import cut

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mhacut.options.keywords import PruneKeywords

_KINDS: dict[str, tuple[UnitKind, ...]] = {"attention": ("qk", "v"), "attention+mlp": ("qk", "v", "hidden")}

# Largest relative difference of masked and sliced outputs in float32 that rounding explains.
_EXACTNESS = 1e-3  # 1e-6 to 1e-4 was seen, the most with 24 blocks
# The same of one model, loaded twice.
_REPEATABILITY = 1e-5


@dataclass(frozen=True)
class ModelFigures:
    """What a model weighs, costs and achieves."""

    flops: int
    parameters: int
    latency_ms: float | None = None
    """Median of interleaved runs, per batch; None when not measured."""
    evaluation: Evaluation | None = None
    """On the validation images; None without any."""


@dataclass(frozen=True)
class PruneResult:
    """What :func:`prune` did."""

    output: Path | None
    """The slim file; None after a dry run."""
    architecture: str
    plan: Plan
    """In the indices of the model that was read."""
    budget: int
    """FLOPs."""
    dense: ModelFigures
    """The model that was read."""
    slim: ModelFigures
    """The file that was written (the model in memory, after a dry run)."""
    data: str
    """What the search looked at."""
    not_prunable: tuple[str, ...]
    """What could not be cut exactly, or is never touched, and why."""
    repairs: Mapping[UnitKey, UnitRepair]
    """How the repair of each unit went; empty without repair."""
    device: str
    latency_batch_size: int
    """Images per batch of ``latency_ms``."""
    seconds: Mapping[str, float]
    """Per stage."""
    log: tuple[SearchStep, ...]
    """Of the indicators, where they were trained."""
    curves: Mapping[UnitKey, Curve]
    """Estimated KL divergence in nats per width of every unit; empty where no curve was needed."""
    report: Path | None
    """The page about the run; None when not asked for."""
    divergence: float
    """Of the slim model from the dense one on the images that judged (:attr:`judged_on`), see
    :class:`mhacut.pruning.distill.Divergence`."""
    divergence_of: Literal["answers", "features"]
    """KL divergence in nats of a classifier's answers, or squared error of features over their variance."""
    judged_on: int
    """How many images those are. They chose how strongly to refit: on others, expect more."""


def prune(
    checkpoint: PathLike,
    *,
    flops: str | float,
    reporter: Reporter | None = None,
    **options: Unpack[PruneKeywords],
) -> PruneResult:
    """Cut ``checkpoint`` down to ``flops`` and write a slim safetensors file.

    Args:
        checkpoint: ``.safetensors``, ``.pth``, a timm folder, a slim file, or ``timm:NAME``.
        flops: ``2.0G``, ``600M``, ``2e9`` or ``50%``; one FLOP is one multiply-accumulate.
        reporter: receives progress and messages; silent by default.
        options: those of the command line; see :class:`mhacut.options.keywords.PruneKeywords`.

    Under torchrun every process calls this alike and calibrates on its share of the images; the first then
    searches and writes, and all return what it did.

    Raises:
        MhacutError: and its kinds, in :mod:`mhacut.errors`; nothing was written.
    """
    return run_prune(
        PruneOptions.from_flat(checkpoint=checkpoint, flops=str(flops), **options), reporter or Silent()
    )


def run_prune(options: PruneOptions, reporter: Reporter) -> PruneResult:
    """:func:`prune` with its options in one object."""
    with gathered(options.device) as processes:
        clock = _Clock(reporter if processes.first else Silent())
        with processes.together():
            subject = _read(options, processes, clock)
        clock.start("calibrating")
        calibration = calibrate(
            subject.dense,
            subject.prunable,
            subject.seen.images,
            batch_size=options.search.batch_size,
            fisher_images=_sensitivity_images(options.search, len(subject.seen.images)),
            token_weights=options.search.token_weights,
            seed=options.search.seed,
            classifier=gives_probabilities(subject.dense),
            progress=lambda done, total: clock.reporter.advance(done, total),
            processes=processes,
        )
        return processes.from_first(lambda: _cut_down(subject, calibration, options, clock))


@dataclass(frozen=True)
class _Subject:
    """What is to be cut, and what with."""

    loaded: LoadedModel
    target: Path
    dense: nn.Module
    """Without gradients, on ``device``."""
    device: torch.device
    preprocessing: Preprocessing
    prunable: PrunableLayers
    not_prunable: tuple[str, ...]
    table: CostTable
    budget: int
    seen: CalibrationImages
    loader: EvaluationLoader | None
    evaluation: Evaluation | None
    """Of the dense model, in the first process."""


def _read(options: PruneOptions, processes: Processes, clock: _Clock) -> _Subject:
    """Everything that can be found wrong before the work."""
    reporter = clock.reporter
    asked = Budget.parse(options.flops)
    device = processes.device
    if options.report is not None:
        check_output(options.report, overwrite=options.overwrite, input_path=options.checkpoint)
    if options.output is not None and not options.dry_run:
        check_output(options.output, overwrite=options.overwrite, input_path=options.checkpoint)

    clock.start("reading")
    given = options.flat()
    idle = options.idle()
    for name, reason in idle.items():
        flag = ("no-" if given[name] is False else "") + name.replace("_", "-")
        reporter.log(f"--{flag} has no effect: {reason}")
    if options.amp and "amp" not in idle:
        warn_of_slow_amp(device, reporter.log)
    loaded = read_as_told(options, reporter)
    target = Path(options.output or f"{loaded.stem}-{asked.label}.safetensors")
    if not options.dry_run:
        check_output(target, overwrite=options.overwrite, input_path=loaded.path)
    dense = loaded.model.requires_grad_(False)
    preprocessing = resolve_preprocessing(loaded, options.preprocessing)
    prunable = find_prunable_layers(dense)
    table = build_cost_table(dense, prunable, preprocessing.input_size)
    budget = _reachable(asked, table, prunable, _KINDS[options.scope], options.round_to)
    whole = not_prunable(prunable)
    for line in whole:
        reporter.log(f"left whole: {line}")

    clock.start("loading images")
    classes = classifier_size(dense)
    seen = _calibration_images(options, preprocessing, classes)
    reporter.log(f"searching on {seen.description}")

    dense.to(device)
    # Before the work, so that whatever is wrong with the images is said before anything is written.
    loader = _evaluation_loader(options, preprocessing, classes, reporter)
    evaluation = None
    if loader is not None and processes.first:
        clock.start("evaluating")
        evaluation = evaluate(dense, loader, device=device, progress=reporter.advance)
    return _Subject(
        loaded=loaded,
        target=target,
        dense=dense,
        device=device,
        preprocessing=preprocessing,
        prunable=prunable,
        not_prunable=whole,
        table=table,
        budget=budget,
        seen=seen,
        loader=loader,
        evaluation=evaluation,
    )


def _cut_down(
    subject: _Subject, calibration: Calibration, options: PruneOptions, clock: _Clock
) -> PruneResult:
    """Search, cut, check, write and measure."""
    reporter = clock.reporter
    loaded, target, dense, device = subject.loaded, subject.target, subject.dense, subject.device
    preprocessing, prunable, table = subject.preprocessing, subject.prunable, subject.table
    budget, seen = subject.budget, subject.seen
    distillation = Distillation(
        seen.images,
        calibration.teacher,
        seen.labels,
        batch_size=options.search.batch_size,
        seed=options.search.seed,
        label_weight=options.search.label_weight,
        classifier=gives_probabilities(dense),
        amp=options.amp,
    )
    planned = Planner(
        dense,
        prunable,
        prunable.units(_KINDS[options.scope]),
        table,
        calibration,
        distillation,
        budget=budget,
        round_to=options.round_to,
        options=options.search,
        start_stage=clock.start,
        progress=reporter.advance,
    ).plan()
    if planned.note is not None:
        reporter.log(planned.note)
    ready = planned.ready

    clock.start("cutting")
    dense.cpu()
    slim = copy.deepcopy(ready.model.cpu())
    cut(slim, ready.plan, ready.channel_scales)
    flops = _checked_flops(slim, table, ready.plan, budget, preprocessing)
    probe = seen.images[:4]
    _check_exact(ready, slim, prunable, probe)
    slim = finish(
        slim,
        dense,
        calibration,
        distillation,
        options.search,
        device,
        start_stage=clock.start,
        progress=reporter.advance,
        note=reporter.log,
    )
    record = _record(options, loaded, planned, preprocessing, seen, budget, table.dense, flops)
    if not options.dry_run:
        clock.start("writing")
        write_slim(
            target, slim, record, dtypes=loaded.dtypes, overwrite=options.overwrite, input_path=loaded.path
        )
        slim = _read_back(target, slim, loaded, probe)

    clock.start("measuring")
    models = (dense.to(device), slim.to(device))
    evaluation = None
    if subject.loader is not None:
        evaluation = evaluate(slim, subject.loader, device=device, progress=reporter.advance)
    judge = distillation.part(0, max(calibration.held, 1))
    divergence = judge.divergence_of(slim)
    times: tuple[float | None, ...] = (None, None)
    if options.latency:
        batch = options.latency_batch_size
        times = tuple(compare_latency(models, preprocessing.input_size, batch_size=batch, device=device))
    before = ModelFigures(table.dense, count_parameters(dense), times[0], subject.evaluation)
    after = ModelFigures(flops, count_parameters(slim), times[1], evaluation)
    report = None
    if options.report is not None:
        clock.start("reporting")
        report = write_report(
            options.report,
            loaded=loaded,
            dense=dense,
            slim=slim,
            record=record,
            name=f"{target} (dry run)" if options.dry_run else str(target),
            images=seen.images,
            data=seen.description,
            steps=planned.log,
            figures=_figures(before, after, options.latency_batch_size, str(device)),
            batch_size=options.search.batch_size,
            overwrite=options.overwrite,
        )
    clock.stop()
    return PruneResult(
        output=None if options.dry_run else target,
        architecture=loaded.identity.architecture,
        plan=ready.plan,
        budget=budget,
        dense=before,
        slim=after,
        data=seen.description,
        not_prunable=subject.not_prunable,
        repairs=ready.repairs,
        device=str(device),
        latency_batch_size=options.latency_batch_size,
        seconds=clock.seconds,
        log=planned.log,
        curves=planned.curves,
        report=report,
        divergence=divergence,
        divergence_of="answers" if judge.divergence.classifier else "features",
        judged_on=len(judge.images),
    )


def _figures(
    before: ModelFigures, after: ModelFigures, batch_size: int, device: str
) -> list[tuple[str, str, str]]:
    """What was measured besides FLOPs and parameters, for the page."""
    told = []
    if before.evaluation is not None and after.evaluation is not None:
        name = f"top-1, % of {before.evaluation.images} images"
        told.append((name, f"{before.evaluation.top1:.2f}", f"{after.evaluation.top1:.2f}"))
    if before.latency_ms is not None and after.latency_ms is not None:
        name = f"latency, ms (batch {batch_size}, {device})"
        told.append((name, f"{before.latency_ms:.2f}", f"{after.latency_ms:.2f}"))
    return told


def _reachable(
    asked: Budget, table: CostTable, prunable: PrunableLayers, kinds: tuple[UnitKind, ...], round_to: int
) -> int:
    """The budget in FLOPs, refused when it is met already or below what the least widths cost."""
    budget = asked.flops(table.dense)
    if budget >= table.dense:
        raise BudgetError(
            f"nothing to prune: the model's {format_flops(table.dense)} FLOPs are already within {asked.text}"
        )
    choices = {unit.key: width_choices(unit.width, round_to) for unit in prunable.units(kinds)}
    lowest = lowest_flops(choices, table.flops)
    if budget < lowest:
        share = 100 * asked.value if asked.value < 1 else asked.value
        meant = f"; did you mean {share:g}%?" if re.fullmatch(r"\d{1,2}|0?\.\d+", asked.text) else ""
        raise BudgetError(
            f"--flops {asked.text} is out of reach: the lowest is {format_flops(lowest, up=True)} "
            f"({math.ceil(1000 * lowest / table.dense) / 10}% of {format_flops(table.dense)}) with scope "
            f"{'attention+mlp' if 'hidden' in kinds else 'attention'} and --round-to {round_to}{meant}"
        )
    return budget


def _calibration_images(
    options: PruneOptions, preprocessing: Preprocessing, classes: int
) -> CalibrationImages:
    return calibration_images(
        preprocessing,
        options.data,
        count=options.images_wanted,
        seed=options.search.seed,
        num_classes=classes or None,
        use_labels=options.labels and classes > 0,
    )


def _sensitivity_images(options: SearchOptions, images: int) -> int:
    """How many of the images to differentiate."""
    if options.allocation not in ("curves", "refined") and not options.repair:
        return 0
    fitted = images - held_out(images)
    return max(1, round(EFFORTS[options.effort].sensitivity_share * fitted))


def _checked_flops(
    slim: nn.Module, table: CostTable, plan: Plan, budget: int, preprocessing: Preprocessing
) -> int:
    """FLOPs of the slim model, counted anew."""
    counted = measure_flops(slim, preprocessing.input_size)
    expected = int(table.flops(plan.widths()))
    if counted != expected or counted > budget:
        raise MhacutError(
            f"the pruned model costs {counted} FLOPs, planned were {expected} within a budget of {budget}; "
            "nothing was written. This is a gap in mhacut: please report the architecture and its arguments"
        )
    return counted


@torch.no_grad()
def _check_exact(ready: Compensation, slim: nn.Module, prunable: PrunableLayers, images: Tensor) -> None:
    """The slim model must compute what the masked model of the dense shape computes."""
    tensors = masked_tensors(ready.model, prunable, ready.channel_scales)
    masked = run_with(ready.model, tensors, images)
    difference = _difference(slim(images), masked)
    if not difference <= _EXACTNESS:
        raise MhacutError(
            f"the sliced model's outputs differ from the masked model's by {difference:.1e} of the largest, "
            f"more than rounding explains ({_EXACTNESS:g}); nothing was written. This is a gap in mhacut: "
            "please report the architecture and its arguments"
        )


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference in units of the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


@torch.no_grad()
def _read_back(target: Path, slim: nn.Module, loaded: LoadedModel, images: Tensor) -> nn.Module:
    """The file as a user will load it, its logits checked against those of the model in memory."""
    for name, parameter in slim.named_parameters():
        parameter.copy_(parameter.to(loaded.dtypes.get(name, parameter.dtype)))
    reloaded = load_model(target)
    # The tensors were compared bit for bit when they were written. Outputs may still differ in the last bit:
    # BLAS sums in another order when a buffer is aligned otherwise (seen in SigLIP's pooling head).
    if not _difference(reloaded(images), slim(images)) <= _REPEATABILITY:
        raise MhacutError(
            f"{target}: was written but gives other logits than the model in memory; do not use it"
        )
    return reloaded


def _record(
    options: PruneOptions,
    loaded: LoadedModel,
    planned: Planned,
    preprocessing: Preprocessing,
    seen: CalibrationImages,
    budget: int,
    flops_before: int,
    flops_after: int,
) -> SlimRecord:
    import timm

    entry: dict[str, Any] = {
        "command": "prune",
        "options": {key: value for key, value in options.flat().items() if key not in _LOCAL_OPTIONS},
        "seed": options.search.seed,
        "budget": budget,
        "flops_before": flops_before,
        "flops_after": flops_after,
        "source_sha256": loaded.sha256,
        "data": seen.description,
        "versions": {
            "mhacut": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
    }
    plan = planned.ready.plan
    if planned.curves:
        entry["curves"] = curves_to_json(planned.curves, plan)
    earlier = loaded.record
    return SlimRecord(
        identity=loaded.identity,
        plan=plan if earlier is None else plan.after(earlier.plan),
        preprocessing=preprocessing.to_json(),
        history=(*(() if earlier is None else earlier.history), entry),
    )


# Where files lie on the machine that made a slim file is nobody else's business.
_LOCAL_OPTIONS = frozenset(
    {"checkpoint", "output", "report", "overwrite", "dry_run", "data_dir", "class_map", "workers"}
)


def _evaluation_loader(
    options: PruneOptions, preprocessing: Preprocessing, classes: int, reporter: Reporter
) -> EvaluationLoader | None:
    """The labelled validation images, where there are any."""
    data = options.data
    if options.eval_images == 0 or classes == 0 or (data.data_dir is None and data.dataset is None):
        return None
    if not has_split(data, data.val_split):
        reporter.log(
            f"accuracy is not measured: no labelled split {data.val_split!r} in {data.data_dir} (--val-split)"
        )
        return None
    return evaluation_loader(
        preprocessing,
        data,
        num_classes=classes,
        batch_size=options.search.batch_size,
        limit=options.eval_images,
    )


class _Clock:
    """Seconds per stage, told to the reporter as they begin."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.seconds: dict[str, float] = {}
        self._stage: tuple[str, float] | None = None

    def start(self, stage: str) -> None:
        self.stop()
        self._stage = (stage, time.perf_counter())
        self.reporter.start(stage)

    def stop(self) -> None:
        if self._stage is not None:
            stage, began = self._stage
            self.seconds[stage] = time.perf_counter() - began
            self._stage = None
