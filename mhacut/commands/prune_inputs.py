"""First stage of ``mhacut prune``: read everything, and find what is wrong with it before the work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from mhacut.budget import Budget
from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.identity import ModelHints
from mhacut.checkpoint.load import open_from_options
from mhacut.checkpoint.module import rebuilt_module
from mhacut.checkpoint.preprocessing import resolve_preprocessing
from mhacut.checkpoint.provenance import Provenance, provenance, with_hint
from mhacut.commands.prune_outputs import outputs_and_tokens
from mhacut.commands.prune_stages import expected_stages
from mhacut.data import (
    CalibrationImages,
    ImagesInMemory,
    Preprocessing,
    calibration_images,
    evaluation_loader,
    has_split,
)
from mhacut.data.in_memory import Expected, check_one_source, split_in_memory
from mhacut.errors import option_name
from mhacut.measuring.accuracy import Evaluation, evaluate
from mhacut.measuring.normalisation import SAMPLE, Batches
from mhacut.options.base import IN_MEMORY
from mhacut.options.prune import PruneOptions
from mhacut.plan import UnitKind
from mhacut.pruning.choose_merges import with_all_merged
from mhacut.pruning.job import Job
from mhacut.pruning.widths import reachable_budget
from mhacut.runtime.device import warn_of_slow_amp
from mhacut.runtime.distributed import Processes
from mhacut.runtime.files import check_output
from mhacut.runtime.progress import Reporter, expect
from mhacut.surgery.costs import CostTable, build_cost_table
from mhacut.surgery.find import PrunableLayers, find_prunable_layers
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.info import classifier_size
from mhacut.surgery.tokens import with_tokens

_KINDS: dict[str, tuple[UnitKind, ...]] = {
    "attention": ("qk", "v"),
    "attention+mlp": ("qk", "v", "hidden"),
    "attention+mlp+tokens": ("qk", "v", "hidden"),
}


class LabelledBatches(Protocol):
    """Batches of (images, labels) to measure accuracy on, in as many passes as are asked for."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Begin a pass."""

    def __len__(self) -> int:
        """Number of batches; 0 if nobody knows."""


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
    target: Path
    """Slim file to write."""
    job: Job

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of each tensor of the job's model in the slim file: that of the tensor it was read from."""
        read, found = self.loaded.dtypes, dict[str, torch.dtype]()
        for name, tensor in self.job.model.state_dict().items():
            # What is only there where tokens are left out is stored as the rest of its layer.
            alike = f"{name.rsplit('.', 2)[0]}.proj.weight"
            found[name] = read.get(name, read.get(alike, tensor.dtype))
        return found


def read_inputs(
    options: PruneOptions,
    processes: Processes,
    reporter: Reporter,
    module: nn.Module | None = None,
    given: ImagesInMemory | None = None,
) -> PruneInputs:
    """Read the checkpoint and the images; measure the dense model.

    Args:
        options: of the command.
        processes: that run it.
        reporter: receives messages and progress.
        module: dense model to prune a copy of, in place of a checkpoint.
        given: images in memory, in place of those that the options name.

    Raises:
        MhacutError: and its kinds: an option, the checkpoint, the images or the output file do not fit.
    """
    budget = Budget.parse(options.flops)
    check_one_source(given, options.data)
    _check_outputs(options)
    reporter.start("reading")
    _log_idle_options(options, processes, reporter, in_memory=given is not None)
    loaded = _open(options, reporter, module)
    target = _target(options, loaded, budget)
    dense = loaded.model.requires_grad_(False)
    preprocessing = resolve_preprocessing(loaded, options.preprocessing)
    size = preprocessing.input_size
    preserved, tokens, merges = outputs_and_tokens(options, dense, size, reporter)
    # Channels are cut in a model that merges nothing; its merges, old or new, come back at the end.
    model = with_tokens(dense, replace(tokens, merged=()))
    merged, prunable = () if merges else tokens.merged, find_prunable_layers(model)
    counted = with_tokens(model, replace(tokens, merged=merged))
    table = _cost_table(dense, counted, prunable, size)
    fewest = _cost_table(dense, with_all_merged(model), prunable, size) if merges else None
    units = prunable.units(_KINDS[options.scope])
    flops = reachable_budget(budget, table, units, options.round_to, fewest)
    _log_limits(flops, table, prunable, reporter)
    dense.to(processes.device)
    images, validation, origins = _images(loaded, options, preprocessing, given, processes, reporter)
    job = Job(
        model=model.to(processes.device),
        prunable=prunable,
        units=units,
        table=table,
        budget=flops,
        images=images.images,
        labels=None if preserved.dense else images.labels,
        options=options.search,
        round_to=options.round_to,
        amp=options.amp,
        reporter=reporter,
        merges_tokens=merges,
        preserved=preserved,
        merged=merged,
    )
    expect(reporter, expected_stages(options, job, 0 if validation is None else len(validation)))
    evaluation = _evaluated(dense, validation, processes, reporter)
    return PruneInputs(options, loaded, preprocessing, origins, images, validation, evaluation, target, job)


def _target(options: PruneOptions, loaded: Checkpoint, budget: Budget) -> Path:
    target = Path(options.output or f"{loaded.stem}-{budget.label}.safetensors")
    if not options.dry_run:
        check_output(target, overwrite=options.overwrite, input_path=loaded.path)
    return target


def _images(
    loaded: Checkpoint,
    options: PruneOptions,
    preprocessing: Preprocessing,
    given: ImagesInMemory | None,
    processes: Processes,
    reporter: Reporter,
) -> tuple[CalibrationImages, LabelledBatches | None, Provenance]:
    """Return images to search on, labelled ones to measure on, and the origins of the preprocessing."""
    reporter.start("loading images")
    classes = classifier_size(loaded.model)
    if given is not None:  # normalised elsewhere: there is nothing to check
        found = _from_memory(given, options, preprocessing, classes, reporter)
        return *found, provenance(loaded, options.preprocessing)
    images = _calibration_images(options, preprocessing, classes, reporter)
    validation = _validation_images(options, preprocessing, classes, reporter)
    origins = _provenance(loaded, options, preprocessing, (images, validation), processes, reporter)
    return images, validation, origins


def _log_limits(budget: int, table: CostTable, prunable: PrunableLayers, reporter: Reporter) -> None:
    if budget >= table.flops({}):
        reporter.log("without the tokens left out the model is within the budget: no channel need be cut")
    for line in prunable.not_prunable:
        reporter.log(f"not prunable: {line}")


def _labelled_sample(
    options: PruneOptions,
    preprocessing: Preprocessing,
    classes: int,
    images: CalibrationImages,
    measured: bool,
) -> Batches | None:
    """Return labelled images to check the preprocessing by: of those to measure on, else to search on."""
    batch_size = options.search.batch_size
    if measured:
        return partial(
            evaluation_loader,
            preprocessing,
            options.data,
            num_classes=classes,
            batch_size=batch_size,
            limit=SAMPLE,
        )
    if images.labels is None:
        return None
    return partial(zip, images.images.split(batch_size), images.labels.split(batch_size))


def _provenance(
    loaded: Checkpoint,
    options: PruneOptions,
    preprocessing: Preprocessing,
    images: tuple[CalibrationImages, LabelledBatches | None],
    processes: Processes,
    reporter: Reporter,
) -> Provenance:
    """Return the origins of the preprocessing; the first process logs a better one."""
    origins = provenance(loaded, options.preprocessing)
    classes, measured = classifier_size(loaded.model), images[1] is not None
    sample = _labelled_sample(options, preprocessing, classes, images[0], measured)
    if sample is not None and processes.first and not origins.normalisation_is_sure:
        reporter.start("checking the preprocessing")
        origins = with_hint(origins, loaded.model, preprocessing, sample, processes.device)
    if origins.hint is not None:
        reporter.log(origins.hint)
    return origins


def _evaluated(
    dense: nn.Module, validation: LabelledBatches | None, processes: Processes, reporter: Reporter
) -> Evaluation | None:
    """Measure the dense model's accuracy, in the first process, where there are labelled images."""
    if validation is None or not processes.first:
        return None
    reporter.start("evaluating")
    return evaluate(dense, validation, device=processes.device, progress=reporter.advance)


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


def _check_outputs(options: PruneOptions) -> None:
    paths = [options.report, None if options.dry_run else options.output]
    for path in paths:
        if path is not None:
            read = None if options.checkpoint == IN_MEMORY else options.checkpoint
            check_output(path, overwrite=options.overwrite, input_path=read)


def _log_idle_options(
    options: PruneOptions, processes: Processes, reporter: Reporter, *, in_memory: bool
) -> None:
    """Name the options that were changed to no effect."""
    given, idle = options.flat(), options.idle(in_memory=in_memory)
    for name, reason in idle.items():
        shown = option_name(name, given[name]) if isinstance(given[name], bool) else option_name(name)
        reporter.log(f"{shown} has no effect: {reason}")
    if options.amp and "amp" not in idle:
        warn_of_slow_amp(processes.device, reporter.log)


def _calibration_images(
    options: PruneOptions, preprocessing: Preprocessing, classes: int, reporter: Reporter
) -> CalibrationImages:
    images = calibration_images(
        preprocessing,
        options.data,
        count=options.images_wanted,
        seed=options.search.seed,
        num_classes=classes or None,
        use_labels=options.labels and classes > 0,
    )
    reporter.log(f"searching on {images.description}")
    return images


def _from_memory(
    given: ImagesInMemory,
    options: PruneOptions,
    preprocessing: Preprocessing,
    classes: int,
    reporter: Reporter,
) -> tuple[CalibrationImages, LabelledBatches | None]:
    """Return the images to search on, and labelled ones besides, where there are any."""
    use_labels = options.labels and classes > 0
    images, validation = split_in_memory(
        given,
        Expected(preprocessing.input_size, classes if use_labels else None),
        count=options.images_wanted,
        measured=options.eval_images,
        seed=options.search.seed,
        batch_size=options.search.batch_size,
    )
    reporter.log(f"searching on {images.description}")
    if options.eval_images and classes and validation is None:
        reason = "no labels" if images.labels is None else "too few images"
        reason = reason if options.labels else option_name("labels", False)
        reporter.log(f"accuracy is not measured: {reason}")
    return images, validation


def _validation_images(
    options: PruneOptions, preprocessing: Preprocessing, classes: int, reporter: Reporter
) -> LabelledBatches | None:
    """Return the labelled validation images, None without any or where labels are not to be used."""
    data = options.data
    if options.eval_images == 0 or classes == 0 or not data.has_images:
        return None
    if not options.labels:
        reporter.log(f"accuracy is not measured: {option_name('labels', False)}")
        return None
    if not has_split(data, data.val_split):
        reporter.log(
            f"accuracy is not measured: no labelled split {data.val_split!r} in {data.data_dir} "
            f"({option_name('val_split')})"
        )
        return None
    return evaluation_loader(
        preprocessing,
        data,
        num_classes=classes,
        batch_size=options.search.batch_size,
        limit=options.eval_images,
    )
