"""Images of ``mhacut prune``: those to search on, and those that its result is judged on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
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
class Answers:
    """Answers of a model to the validation images."""

    logits: Tensor
    """[n, classes], on the CPU."""
    evaluation: Evaluation | None = None
    """Accuracy; None without labels."""
    right: tuple[bool, ...] = ()
    """Whether the top-1 class of each image is its label."""


@dataclass(frozen=True)
class Validation:
    """Images that a result is judged on, and the dense model's answers to them."""

    batches: Iterable[tuple[Tensor, Tensor]] | None
    """Images and labels, the same in every pass; the label -1 stands for none. None without images."""
    sample: str
    """Name of the images, for readers."""
    no_accuracy: str
    """Reason that they have no labels, or that there are none; empty if accuracy is measured."""
    model: nn.Module
    """The dense model, a classifier."""
    processes: Processes
    reporter: Reporter

    @cached_property
    def dense(self) -> Answers:
        """Answers of the dense model, computed in the first process when they are first asked for.

        A budget that is out of reach need not take these minutes.
        """
        answers = self.answers_of(self.model) if self.processes.first else None
        return answers or Answers(torch.empty(0))

    def answers_of(self, model: nn.Module) -> Answers | None:
        """Return the answers of ``model``, which is moved to the device; None without images."""
        if self.batches is None:
            return None
        self.reporter.start("evaluating")
        answers: list[tuple[Tensor, Tensor]] = []
        evaluation = evaluate(
            model,
            self.batches,
            device=self.processes.device,
            progress=self.reporter.advance,
            answers=answers,
        )
        logits, labels = map(torch.cat, zip(*answers, strict=True))
        named = None if self.no_accuracy else replace(evaluation, sample=self.sample)
        return Answers(logits, named, tuple((logits.argmax(1) == labels).tolist()))

    def fidelity(self, answers: Answers) -> Fidelity:
        """Return how like those of the dense model the answers of a slim model are."""
        likeness = agreement(self.dense.logits, answers.logits, classes=True)
        assert likeness.kl is not None
        return Fidelity(likeness.kl, likeness.same_answer, likeness.images, self.sample)


def read_images(
    options: PruneOptions,
    preprocessing: Preprocessing,
    given: ImagesInMemory | None,
    val_given: ImagesInMemory | None,
    judged: partial[Validation],
    *,
    compares: bool,
) -> tuple[CalibrationImages, Validation]:
    """Return images to search on, and images to judge the result on.

    Args:
        options: options of the command.
        preprocessing: preprocessing of the model.
        given: images to search on, in memory.
        val_given: images to judge the result on, in memory.
        judged: makes the images to judge on, with the dense model.
        compares: whether images without labels can judge the result too, because answers are preserved.
    """
    classes, batch_size, seed = classifier_size(judged.keywords["model"]), options.batch_size, options.seed
    use_labels, count = options.labels and classes > 1, options.eval_images if classes > 1 else 0
    no_accuracy = "" if use_labels or classes < 2 else option_name("labels", False)
    expected = Expected(preprocessing.input_size, classes if use_labels else None)
    batches: Iterable[tuple[Tensor, Tensor]] | None = None
    sample = _SEARCHED
    if given is None:
        images = calibration_images(
            preprocessing,
            options,
            count=options.images_wanted,
            seed=seed,
            num_classes=classes if classes > 1 else None,
            use_labels=use_labels,
        )
    else:
        wanted, left = options.images_wanted, count if val_given is None else 0
        images, batches = split_in_memory(
            given, expected, count=wanted, measured=left, seed=seed, batch_size=batch_size
        )
    if not count or (given is None and val_given is None and not options.has_images):
        nothing = "there are no images" if options.eval_images else option_name("eval_images", 0)
        return images, judged(None, sample, nothing if options.max_drop is not None else "")
    if val_given is not None:
        found, _ = split_in_memory(
            val_given, expected, count=count, measured=0, seed=0, batch_size=batch_size
        )
        labels = torch.full((len(found.images),), -1) if found.labels is None else found.labels
        batches = list(zip(found.images.split(batch_size), labels.split(batch_size), strict=True))
        sample = _SEARCHED if val_given is given else _VALIDATION
        no_accuracy = no_accuracy or ("no labels" if found.labels is None else "")
    elif given is not None:
        few = "no labels" if images.labels is None else "too few images"
        no_accuracy = no_accuracy or ("" if batches is not None else few)
    else:
        batches, sample, no_accuracy = _validation_split(options, preprocessing, classes, no_accuracy)
    return images, judged(None if no_accuracy and not compares else batches, sample, no_accuracy)


def _validation_split(
    options: PruneOptions, preprocessing: Preprocessing, classes: int, no_labels: str
) -> tuple[EvaluationLoader | None, str, str]:
    """Return the images of the validation split, if there is one, their name, and why they have no labels."""
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
