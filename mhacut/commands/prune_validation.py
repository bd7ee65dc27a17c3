"""Images of ``mhacut prune``: images to calibrate on, and images to compare the two models on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mhacut.data import (
    CalibrationImages,
    EvaluationLoader,
    ImagesInMemory,
    Preprocessing,
    WithoutLabels,
    calibration_images,
    evaluation_loader,
    has_split,
)
from mhacut.data.folders import split_folder
from mhacut.data.in_memory import Expected, split_in_memory
from mhacut.errors import option_name
from mhacut.measuring.accuracy import Evaluation, Fidelity, agreement, evaluate
from mhacut.options.prune import PruneOptions
from mhacut.runtime.distributed import Processes
from mhacut.runtime.progress import Reporter
from mhacut.surgery.find import classifier_size

_VALIDATION, _SEARCHED = "validation images", "images of the set searched on"


@dataclass(frozen=True)
class Predictions:
    """Logits of a model for the validation images, and their accuracy."""

    logits: Tensor
    """Logits of the validation images, [n, classes], on the CPU."""
    evaluation: Evaluation | None = None
    """Accuracy on the validation images. None without labels."""
    right: tuple[bool, ...] = ()
    """Whether the top-1 class of each image is the label."""


class Validation:
    """Validation images and the dense model's logits for them."""

    def __init__(
        self,
        batches: Iterable[tuple[Tensor, Tensor]] | None,
        sample: str,
        no_accuracy: str,
        *,
        model: nn.Module,
        processes: Processes,
        reporter: Reporter,
    ) -> None:
        self.batches = batches
        """Images and labels, in the same order in every pass. Label -1: no label. None: no images."""
        self.sample = sample
        """Name of the images in texts for users."""
        self.no_accuracy = no_accuracy
        """Reason for measuring no accuracy; empty if accuracy is measured."""
        self.model, self.processes, self.reporter = model, processes, reporter
        self._dense: Predictions | None = None

    def dense_predictions(self) -> Predictions:
        """Return the dense model's predictions. They are computed once, in process 0 only."""
        if self._dense is None:
            predictions = self.predictions_of(self.model) if self.processes.first else None
            self._dense = predictions or Predictions(torch.empty(0))
        return self._dense

    def predictions_of(self, model: nn.Module) -> Predictions | None:
        """Move ``model`` to the device and return its predictions. None without validation images."""
        if self.batches is None:
            return None
        self.reporter.start("evaluating")
        answers: list[tuple[Tensor, Tensor]] = []
        evaluation = evaluate(
            model, self.batches, device=self.processes.device, progress=self.reporter.advance, answers=answers
        )
        logits, labels = map(torch.cat, zip(*answers, strict=True))
        named = None if self.no_accuracy else replace(evaluation, sample=self.sample)
        return Predictions(logits, named, tuple((logits.argmax(1) == labels).tolist()))

    def fidelity(self, slim: Predictions) -> Fidelity:
        likeness = agreement(self.dense_predictions().logits, slim.logits, classes=True)
        assert likeness.kl is not None
        return Fidelity(likeness.kl, likeness.same_answer, likeness.images, self.sample)


def read_images(
    options: PruneOptions,
    preprocessing: Preprocessing,
    images: ImagesInMemory | None,
    val_images: ImagesInMemory | None,
    validation: partial[Validation],
    *,
    compares: bool,
) -> tuple[CalibrationImages, Validation]:
    """Return the calibration images and the validation images.

    ``compares`` states whether the logits of the slim and the dense model are compared, which needs no
    labels.
    """
    model = validation.keywords["model"]
    classes, batch_size, seed = classifier_size(model), options.batch_size, options.seed
    use_labels, count = options.labels and classes > 1, options.eval_images if classes > 1 else 0
    no_accuracy = "" if use_labels or classes < 2 else option_name("labels", False)
    expected = Expected(preprocessing.input_size, classes if use_labels else None)
    batches: Iterable[tuple[Tensor, Tensor]] | None = None
    sample = _SEARCHED
    if images is None:
        calibration = calibration_images(
            preprocessing,
            options,
            count=options.images_wanted,
            seed=seed,
            num_classes=classes if classes > 1 else None,
            use_labels=use_labels,
        )
    else:
        wanted, left = options.images_wanted, count if val_images is None else 0
        calibration, batches = split_in_memory(
            images, expected, count=wanted, measured=left, seed=seed, batch_size=batch_size
        )
    if not count or (images is None and val_images is None and not options.has_images):
        nothing = "there are no images" if options.eval_images else option_name("eval_images", 0)
        return calibration, validation(None, sample, nothing if options.max_drop is not None else "")
    if val_images is not None:
        found, _ = split_in_memory(
            val_images, expected, count=count, measured=0, seed=0, batch_size=batch_size
        )
        labels = torch.full((len(found.images),), -1) if found.labels is None else found.labels
        batches = list(zip(found.images.split(batch_size), labels.split(batch_size), strict=True))
        sample = _SEARCHED if val_images is images else _VALIDATION
        no_accuracy = no_accuracy or ("no labels" if found.labels is None else "")
    elif images is not None:
        few = "no labels" if calibration.labels is None else "too few images"
        no_accuracy = no_accuracy or ("" if batches is not None else few)
    else:
        batches, sample, no_accuracy = _validation_split(options, preprocessing, classes, no_accuracy)
    return calibration, validation(None if no_accuracy and not compares else batches, sample, no_accuracy)


def _validation_split(
    options: PruneOptions, preprocessing: Preprocessing, classes: int, no_labels: str
) -> tuple[EvaluationLoader | None, str, str]:
    """Return the validation images, their name in texts, and the reason for missing labels."""
    split = options.val_split
    if not has_split(options, split):
        where = f"{options.data_dir} ({option_name('val_split')})"
        return None, "", no_labels or f"no labelled split {split!r} in {where}"
    same = split == options.train_split
    if options.dataset is None and options.data_dir is not None:  # folders have aliases
        root = Path(options.data_dir)
        same = split_folder(root, split) == split_folder(root, options.train_split)
    elif no_labels:
        return None, "", no_labels  # whether it has such a split is known only once it is opened
    opened = partial(
        evaluation_loader,
        preprocessing,
        options,
        num_classes=classes,
        batch_size=options.batch_size,
        limit=options.eval_images,
    )
    try:
        loader = opened(use_labels=not no_labels)
    except WithoutLabels as error:
        loader, no_labels = opened(use_labels=False), str(error)
    return loader, _SEARCHED if same else _VALIDATION, no_labels
