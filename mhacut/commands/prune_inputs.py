"""First stage of ``mhacut prune``: read everything, and find what is wrong with it before the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from mhacut.adapters.base import Unit
from mhacut.budget import Targets
from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.identity import ModelHints
from mhacut.checkpoint.load import open_from_options
from mhacut.checkpoint.module import rebuilt_module
from mhacut.checkpoint.preprocessing import resolve_preprocessing
from mhacut.checkpoint.provenance import Provenance
from mhacut.commands.prune_images import LabelledBatches, read_images
from mhacut.commands.prune_latency import TimeTarget
from mhacut.commands.prune_names import (
    check_files,
    check_files_before_reading,
    options_of_each,
    parse_targets,
)
from mhacut.commands.prune_outputs import layers_that_run, outputs_and_tokens
from mhacut.commands.prune_targets import Reach, stored_dtypes
from mhacut.commands.stopwatch import Stopwatch
from mhacut.data import (
    CalibrationImages,
    ImagesInMemory,
    Preprocessing,
    has_split,
)
from mhacut.data.in_memory import check_one_source
from mhacut.errors import UsageError, option_name
from mhacut.measuring.accuracy import Evaluation, evaluate
from mhacut.measuring.layer_times import TimeTable
from mhacut.measuring.time_curve import TimeCurve
from mhacut.options.prune import PruneOptions
from mhacut.plan import Plan, UnitKind
from mhacut.pruning.calibrate import HELD_OUT, held_out_count
from mhacut.pruning.choose_merges import with_all_merged
from mhacut.pruning.job import Job
from mhacut.pruning.limits import MULTIPLE, Constraints, Limit, Limits
from mhacut.runtime.device import warn_of_slow_amp
from mhacut.runtime.distributed import Processes
from mhacut.runtime.progress import Reporter
from mhacut.surgery.costs import CostTable, Dtypes, build_cost_table
from mhacut.surgery.find import PrunableLayers, classifier_size, find_prunable_layers
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.tokens import with_tokens

_KINDS: dict[str, tuple[UnitKind, ...]] = {
    "attention": ("qk", "v"),
    "attention+mlp": ("qk", "v", "hidden"),
    "attention+mlp+tokens": ("qk", "v", "hidden"),
}
_GPU_MULTIPLE = 16
"""What widths are multiples of where the time on a GPU counts."""
_QUARTERS = 4
"""Least number of widths that are left to choose from there; layers are timed at as many."""
_FEW_HELD_OUT = 16
"""Number of held-out images below which a bound that is measured on them gets a warning."""
_USUAL, _LARGE = 224, 448
"""Usual size of images, in pixels, and the largest about which nothing is logged."""


@dataclass(frozen=True)
class PruneInputs:
    """Everything that ``mhacut prune`` reads."""

    options: PruneOptions
    loaded: Checkpoint
    preprocessing: Preprocessing
    provenance: Provenance
    """Origin of each value in ``preprocessing``."""
    images: CalibrationImages
    validation: LabelledBatches | None
    """Labelled images to measure accuracy on; None without any."""
    evaluation: Evaluation | None
    """Accuracy of the dense model, in the first process."""
    right: tuple[bool, ...]
    """Whether the dense model's top-1 class is right, for each image that its accuracy was measured on."""
    target: Path
    """Slim file to write."""
    job: Job
    """The job."""
    budget: int
    """Budget of FLOPs; the dense model's FLOPs where none is given or a bound on the loss decides."""
    storage: Limits
    """Limits on parameters, bytes and time."""
    targets: Targets
    """Budgets of this file."""
    stopwatch: Stopwatch
    """Measures times."""
    time_target: TimeTarget | None
    """Budget of time, where there is one."""

    def limits(self, storage: Limits) -> Limits:
        """Return limits on FLOPs and on what is stored."""
        return (Limit(self.job.table.flops, self.budget), *storage)

    @property
    def dtypes(self) -> Dtypes:
        """Dtype of each tensor of the job's model in the slim file."""
        return stored_dtypes(self.loaded, self.job.model)


def read_inputs(
    options: PruneOptions,
    processes: Processes,
    reporter: Reporter,
    module: nn.Module | None = None,
    given: ImagesInMemory | None = None,
) -> tuple[PruneInputs, ...]:
    """Read the checkpoint and the images; measure the dense model.

    Returns:
        The inputs of each file to write; they differ in their options, file and limits only.

    Args:
        options: of the command.
        processes: that run it.
        reporter: receives messages and progress.
        module: dense model to prune a copy of, in place of a checkpoint.
        given: images in memory, in place of those that the options name.

    Raises:
        MhacutError: and its kinds: an option, the checkpoint, the images or the output file do not fit.
    """
    targets = parse_targets(options)
    check_one_source(given, options.data)
    check_files_before_reading(options)  # the command line did; Python did not
    reporter.start("reading")
    for note in options.idle().values():
        reporter.log(note)
    if options.amp:
        warn_of_slow_amp(processes.device, reporter.log)
    loaded = _open(options, reporter, module)
    each = options_of_each(options, loaded.stem)
    check_files(options, each, loaded.path)  # default names of what is no file are known only now
    dense = loaded.model.requires_grad_(False)
    preprocessing = resolve_preprocessing(loaded, options.preprocessing)
    _log_large_images(options, loaded, preprocessing.input_size, reporter)
    stopwatch = Stopwatch(options.timing, dense, preprocessing.input_size, processes.device, reporter)
    time_target = _time_target(options, stopwatch, loaded, processes)
    job, limits = _job(options, loaded, preprocessing, (targets, time_target), reporter)
    _check_bounds(options, classifier_size(dense), reporter, in_memory=given is not None)
    dense.to(processes.device)
    images, validation, origins = read_images(loaded, options, preprocessing, given, processes, reporter)
    _check_held_out(options.max_kl, len(images.images), reporter)
    job = replace(job, model=job.model.to(processes.device), images=images.images, labels=images.labels)
    evaluated = _evaluated(dense, validation, processes, reporter)
    return tuple(
        PruneInputs(
            own,
            loaded,
            preprocessing,
            origins,
            images,
            validation,
            *evaluated,
            Path(str(own.output)),
            job,
            flops,
            storage,
            asked,
            stopwatch,
            time_target,
        )
        for own, asked, (flops, storage) in zip(each, targets, limits, strict=True)
    )


def _log_large_images(
    options: PruneOptions, loaded: Checkpoint, input_size: tuple[int, int, int], reporter: Reporter
) -> None:
    """Log what images of a large default size cost, where the model can take smaller ones."""
    _, height, width = input_size
    chosen = options.preprocessing.img_size is not None or "img_size" in options.model_args
    # A slim file states its own arguments, and takes no others.
    fixed = loaded.record is not None or getattr(loaded.model, "dynamic_img_size", None) is not False
    if height * width > _LARGE**2 and not fixed and not chosen:
        smaller = option_name("model_args", {"dynamic_img_size": True})
        reporter.log(
            f"images have {height}x{width} pixels, {height * width / _USUAL**2:.1f} times those of "
            f"{_USUAL}x{_USUAL}, and take as much longer at least; {smaller} with "
            f"{option_name('img_size', _USUAL)} prunes for those"
        )


def _multiple(
    options: PruneOptions, units: Sequence[Unit], time_target: TimeTarget | None, reporter: Reporter
) -> int:
    """Return what widths are multiples of."""
    if options.round_to is not None:
        return options.round_to
    narrow = any(unit.width < _QUARTERS * _GPU_MULTIPLE for unit in units)  # or few widths would be left
    if time_target is None or time_target.stopwatch.device.type == "cpu" or narrow:
        return MULTIPLE
    reporter.log(
        f"widths are multiples of {_GPU_MULTIPLE}, not {MULTIPLE}, for the kernels of GPUs; "
        f"{option_name('round_to', MULTIPLE)} allows more widths"
    )
    return _GPU_MULTIPLE


def _time_target(
    options: PruneOptions, stopwatch: Stopwatch, loaded: Checkpoint, processes: Processes
) -> TimeTarget | None:
    """Return the budget of time, where there is one.

    Raises:
        UsageError: there are several processes, which would disturb each other's measurements.
    """
    asked = options.max_latency
    if asked is not None and processes.size > 1:
        found = f"found {processes.size} of torchrun"
        raise UsageError(f"{option_name('max_latency', asked)}: expected one process, {found}")
    before = Plan(()) if loaded.record is None else loaded.record.plan
    return None if asked is None else TimeTarget(asked, stopwatch, before)


def _job(
    options: PruneOptions,
    loaded: Checkpoint,
    preprocessing: Preprocessing,
    asked: tuple[Sequence[Targets], TimeTarget | None],
    reporter: Reporter,
) -> tuple[Job, list[tuple[int, Limits]]]:
    """Return the job, still without images, and the FLOPs and other limits of each file.

    Raises:
        BudgetError: a target is out of reach, or there is nothing to prune.
    """
    dense, size = loaded.model, preprocessing.input_size
    preserved, tokens, merges = outputs_and_tokens(options, dense, size, reporter)
    # Channels are cut in a model that merges nothing; its merges, old or new, come back at the end.
    model = with_tokens(dense, replace(tokens, merged=()))
    merged, prunable = () if merges else tokens.merged, find_prunable_layers(model)
    if preserved.dense:
        prunable = layers_that_run(model, prunable, preserved, size)
    counted = with_tokens(model, replace(tokens, merged=merged))
    table = _cost_table(dense, counted, prunable, size)
    fewest = _cost_table(dense, with_all_merged(model, size), prunable, size) if merges else None
    units = prunable.units(_KINDS[options.scope])
    job = Job(
        model=model,
        prunable=prunable,
        units=units,
        table=table,
        images=torch.empty(0, *size),
        options=options.search,
        round_to=_multiple(options, units, asked[1], reporter),
        amp=options.amp,
        reporter=reporter,
        fewest=fewest,
        preserved=preserved,
        merged=merged,
        constraints=Constraints(options.exclude, options.min_width, options.equal_qkv),
    )
    targets, time_target = asked
    times: TimeTable | TimeCurve | None = None
    if time_target is not None:
        times = time_target.curve(job) if merges else time_target.table(job, counted)
    reach = Reach(options, loaded, job, times)
    limits = [reach.limits(own) for own in targets]
    for own, (flops, _) in zip(targets, limits, strict=True):
        budget = own["flops"]
        if budget is not None and table.flops({}) <= flops < table.dense:
            reporter.log(
                f"{option_name('flops', budget.text)}: leaving out unused tokens already meets this budget; "
                "no channels need to be pruned"
            )
    for line in prunable.not_prunable:
        reporter.log(f"not prunable: {line}")
    return job, limits


def _evaluated(
    dense: nn.Module, validation: LabelledBatches | None, processes: Processes, reporter: Reporter
) -> tuple[Evaluation | None, tuple[bool, ...]]:
    """Measure the dense model's accuracy, in the first process, where there are labelled images.

    Returns:
        The accuracy, and whether each answer is right.
    """
    if validation is None or not processes.first:
        return None, ()
    reporter.start("evaluating")
    right: list[bool] = []
    device, progress = processes.device, reporter.advance
    found = evaluate(dense, validation, device=device, progress=progress, right=right)
    return found, tuple(right)


def _cost_table(
    dense: nn.Module, counted: nn.Module, prunable: PrunableLayers, size: tuple[int, int, int]
) -> CostTable:
    """Return the cost table of ``counted``, which is ``dense`` with fewer tokens, and the FLOPs of that."""
    table = build_cost_table(counted, prunable, size)
    return table if counted is dense else replace(table, dense=measure_flops(dense, size))


def _open(options: PruneOptions, reporter: Reporter, module: nn.Module | None) -> Checkpoint:
    if module is None:
        return open_from_options(options, reporter)
    rebuilt = rebuilt_module(
        module, ModelHints(options.model, options.model_args, options.num_classes, options.part)
    )
    for note in rebuilt.notes:
        reporter.log(note)
    return rebuilt


def _check_bounds(options: PruneOptions, classes: int, reporter: Reporter, *, in_memory: bool) -> None:
    """Refuse bounds on a loss that cannot be measured, and warn of one that is measured badly.

    Raises:
        UsageError: there is no classifier, or there are no labelled images.
    """
    for name in ("max_kl", "max_drop"):
        bound = getattr(options, name)
        if bound is not None and classes < 2:
            what = "one output" if classes else "no classifier"
            raise UsageError(
                f"{option_name(name, bound)}: expected two or more classes; the model has {what}"
            )
    if options.max_kl is not None and options.preserve not in (None, "answers"):
        bound = option_name("max_kl", options.max_kl)
        raise UsageError(
            f"{bound}: bounds the classifier's outputs, not what {option_name('preserve', options.preserve)} "
            "keeps"
        )
    if options.max_kl is not None and not in_memory and not options.data.has_images:
        bound, better = option_name("max_kl", options.max_kl), option_name("data_dir")
        reporter.log(f"{bound} is measured on synthetic images, which say little about yours; give {better}")
    if options.max_drop is None:
        return
    asked, data = option_name("max_drop", options.max_drop), options.data
    if not options.labels:
        raise UsageError(f"{asked}: expected labels, which {option_name('labels', False)} leaves out")
    if options.eval_images == 0:
        raise UsageError(
            f"{asked}: expected images to measure accuracy on, found {option_name('eval_images', 0)}"
        )
    if not in_memory and (not data.has_images or not has_split(data, data.val_split)):
        where = f"split {data.val_split!r} ({option_name('val_split')}) of {option_name('data_dir')}"
        raise UsageError(
            f"{asked}: expected labelled images to measure accuracy on, in the {where}; without labels, "
            f"{option_name('max_kl')} bounds the KL divergence"
        )


def _check_held_out(max_kl: float | None, images: int, reporter: Reporter) -> None:
    """Refuse a bound on the loss where no image is held out to measure it, and warn of few.

    Raises:
        UsageError: there is one image.
    """
    if max_kl is None:
        return
    bound, held = option_name("max_kl", max_kl), held_out_count(images)
    if not held:
        raise UsageError(
            f"{bound}: expected two images or more, of which some are held out to measure it; found {images}"
        )
    if held < _FEW_HELD_OUT:
        reporter.log(
            f"{bound} is measured on {held} of {images} images, which say little about others; "
            f"give {_FEW_HELD_OUT * round(1 / HELD_OUT)} or more"
        )
