"""Images of ``mhacut prune``: those to search on, labelled ones to measure on, and their preprocessing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Protocol

from torch import Tensor

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.provenance import Provenance, provenance, with_hint
from mhacut.data import (
    CalibrationImages,
    ImagesInMemory,
    Preprocessing,
    WithoutLabels,
    calibration_images,
    evaluation_loader,
    has_split,
)
from mhacut.data.in_memory import Expected, split_in_memory
from mhacut.errors import UsageError, option_name
from mhacut.measuring.normalisation import SAMPLE, Batches
from mhacut.options.prune import PruneOptions
from mhacut.runtime.distributed import Processes
from mhacut.runtime.progress import Reporter
from mhacut.surgery.find import classifier_size


class LabelledBatches(Protocol):
    """Batches of (images, labels) to measure accuracy on, in as many passes as are asked for."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Begin a pass."""

    def __len__(self) -> int:
        """Number of batches; 0 if nobody knows."""


def read_images(
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
        if options.max_drop is not None and found[1] is None:
            asked = option_name("max_drop", options.max_drop)
            raise UsageError(f"{asked}: expected labels with the images, to measure accuracy")
        return *found, provenance(loaded, options.preprocessing)
    images = _calibration_images(options, preprocessing, classes, reporter)
    validation = _validation_images(options, preprocessing, classes, reporter)
    origins = _provenance(loaded, options, preprocessing, (images, validation), processes, reporter)
    return images, validation, origins


def _labelled_sample(
    options: PruneOptions,
    preprocessing: Preprocessing,
    classes: int,
    images: CalibrationImages,
    measured: bool,
) -> Batches | None:
    """Return labelled images to check the preprocessing on: those to measure on, else to search on."""
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


def _calibration_images(
    options: PruneOptions, preprocessing: Preprocessing, classes: int, reporter: Reporter
) -> CalibrationImages:
    images = calibration_images(
        preprocessing,
        options.data,
        count=options.images_wanted,
        seed=options.search.seed,
        num_classes=classes if classes > 1 else None,
        use_labels=options.labels and classes > 1,
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
    use_labels = options.labels and classes > 1
    images, validation = split_in_memory(
        given,
        Expected(preprocessing.input_size, classes if use_labels else None),
        count=options.images_wanted,
        measured=options.eval_images,
        seed=options.search.seed,
        batch_size=options.search.batch_size,
    )
    reporter.log(f"searching on {images.description}")
    if options.eval_images and classes > 1 and validation is None:
        reason = "no labels" if images.labels is None else "too few images"
        reason = reason if options.labels else option_name("labels", False)
        reporter.log(f"accuracy is not measured: {reason}")
    return images, validation


def _validation_images(
    options: PruneOptions, preprocessing: Preprocessing, classes: int, reporter: Reporter
) -> LabelledBatches | None:
    """Return the labelled validation images; None if there are none, or labels may not be used."""
    data = options.data
    if options.eval_images == 0 or classes < 2 or not data.has_images:
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
    try:
        return evaluation_loader(
            preprocessing,
            data,
            num_classes=classes,
            batch_size=options.search.batch_size,
            limit=options.eval_images,
        )
    except WithoutLabels as error:
        if options.max_drop is not None or "eval_images" in options.changed():
            raise  # somebody asked for accuracy
        reporter.log(f"accuracy is not measured: {error}")
        return None
