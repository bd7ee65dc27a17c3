"""Loss of fine-tuning: distillation of the teacher's logits, and labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.identity import dense_args
from mhacut.checkpoint.load import open_checkpoint, states_its_model
from mhacut.checkpoint.preprocessing import resolve_preprocessing
from mhacut.data import Preprocessing
from mhacut.errors import (
    CheckpointError,
    option_name,
    options_written_by,
)
from mhacut.options.finetune import AugmentationOptions, FinetuneOptions
from mhacut.options.option import require
from mhacut.pruning.preserve import ANSWERS
from mhacut.runtime.progress import Reporter
from mhacut.surgery.find import classifier_size

_OPTIONS = {
    "checkpoint": "teacher",
    "model": "teacher_model",
    "model_args": "teacher_model_args",
    "part": "teacher_part",
}
"""Names of options that open a checkpoint, mapped to the options that open the teacher."""


class Teacher:
    """Frozen model whose outputs the student learns to reproduce."""

    def __init__(
        self, model: nn.Module, own: Preprocessing, student: Preprocessing, *, sha256: str | None = None
    ) -> None:
        self.sha256 = sha256
        self.model = model.eval().requires_grad_(False)
        # Images of the student are x = (pixel - m) / s, those of the teacher (pixel - M) / S
        # = x * (s / S) + (m - M) / S.
        device = next(model.parameters()).device
        m, s, M, S = (
            torch.tensor(values, device=device).view(-1, 1, 1)
            for values in (student.mean, student.std, own.mean, own.std)
        )
        self._scale, self._shift = s / S, (m - M) / S
        self._same = (student.mean, student.std) == (own.mean, own.std)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the teacher's outputs for images [B, C, H, W] that have the student's normalisation."""
        outputs: Tensor = self.model(images if self._same else images * self._scale + self._shift)
        return outputs


class Objective:
    """Distillation loss plus weighted cross-entropy, averaged over the images of a batch.

    The distillation loss is temperature^2 times the divergence of the softened logits (Hinton et al., arXiv
    1503.02531).
    """

    def __init__(self, options: FinetuneOptions, classes: int, teacher: Teacher | None = None) -> None:
        self.teacher = teacher
        self.label_weight = 1.0 if teacher is None else options.label_weight
        self.temperature = options.kd_temperature
        self.smoothing = options.smoothing
        # Without classes, outputs are no distributions.
        self.divergence = ANSWERS.divergence if classes > 1 else _relative_error

    def teacher_targets(self, images: Tensor) -> Tensor | None:
        return None if self.teacher is None else self.teacher(images)

    def __call__(self, outputs: Tensor, labels: Tensor | None, teacher_targets: Tensor | None) -> Tensor:
        """Return the loss. Outputs are [B, classes]. Labels are [B], or after mixup [B, classes]."""
        outputs = outputs.float()
        loss = outputs.new_zeros(())
        if teacher_targets is not None:
            # The gradient of outputs that are softened by t falls with 1 / t^2, which the factor undoes.
            t = self.temperature
            loss = loss + t * t * self.divergence(outputs / t, teacher_targets.float() / t)
        if labels is not None and self.label_weight > 0:
            # Probabilities come from timm's mixup, which has smoothed them.
            smoothing = self.smoothing if labels.dim() == 1 else 0.0
            loss = loss + self.label_weight * F.cross_entropy(outputs, labels, label_smoothing=smoothing)
        return loss


def _relative_error(outputs: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over images of the squared error divided by the teacher's variance in the image."""
    # The variance of the whole batch would depend on the number of processes. A single value has no variance,
    # so its error keeps its unit.
    error = (outputs - teacher).flatten(1).square().mean(1)  # [B]
    values = teacher.flatten(1)
    return (error / values.var(1).clamp_min(1e-12) if values.shape[1] > 1 else error).mean()


class Mixing:
    """timm's mixup and cutmix. All parts of a training step use the same random draw."""

    def __init__(self, options: AugmentationOptions, classes: int) -> None:
        self.on = options.mixup > 0 or options.cutmix > 0
        self._mixup = Mixup(
            mixup_alpha=options.mixup,
            cutmix_alpha=options.cutmix,
            prob=options.mixup_prob,
            switch_prob=options.mixup_switch_prob,
            mode="batch",
            label_smoothing=options.smoothing,
            num_classes=max(classes, 1),
        )

    def __call__(self, images: Tensor, labels: Tensor | None, seed: int) -> tuple[Tensor, Tensor | None]:
        """Mix images [B, C, H, W] in place. Labels [B] become probabilities [B, classes]."""
        if not self.on:
            return images, labels
        np.random.seed(seed % 2**32)  # timm draws from numpy's generator
        targets = images.new_zeros(len(images), dtype=torch.int64) if labels is None else labels
        mixed, targets = self._mixup(images, targets)
        return mixed, None if labels is None else targets


def with_dense_model(options: FinetuneOptions, slim: Checkpoint, reporter: Reporter) -> FinetuneOptions:
    if options.teacher is None and options.resume is None and options.find_teacher:
        history = () if slim.record is None else slim.record.history
        first = history[0] if history else {}
        name, used, folder = str(first.get("source", "")), first.get("options"), Path(slim.source).parent
        part = used.get("part") if isinstance(used, dict) else None
        part = options.teacher_part or (None if part is None else str(part))
        # Anybody can write a record: only a file of this digest is taken, and of its name the last part.
        for path in (folder / Path(name).name, Path(name).name) if name else ():
            with suppress(CheckpointError):
                with_teacher = replace(options, teacher=str(path), teacher_part=part)
                dense = _teacher_file(with_teacher, slim)
                same = dense.sha256 == first.get("source_sha256")
                # A teacher with other classes cannot teach the slim model's classifier.
                if same and classifier_size(dense.skeleton) == classifier_size(slim.skeleton):
                    labels = option_name("find_teacher", False)
                    reporter.log(f"distilling from the dense model {path} ({labels} trains on labels only)")
                    return with_teacher
        option = option_name("teacher", name or "PATH")
        reporter.log(
            f"training on labels only. Distilling the dense model usually gives more accuracy: {option}"
        )
    if options.teacher is None:
        require("labels", options.labels, options.labels, f"a {option_name('teacher')}")
    return options


def make_objective(
    options: FinetuneOptions,
    slim: Checkpoint,
    student: nn.Module,
    preprocessing: Preprocessing,
    reporter: Reporter,
) -> Objective:
    teacher = None
    if options.teacher is not None:
        teacher = _open_teacher(options, slim, student, preprocessing)
        history = () if slim.record is None else slim.record.history
        if history and teacher.sha256 != history[0].get("source_sha256"):
            reporter.log("the teacher is not the dense model that this slim file was pruned from")
    return Objective(options, classifier_size(student), teacher)


def _open_teacher(
    options: FinetuneOptions, slim: Checkpoint, student: nn.Module, preprocessing: Preprocessing
) -> Teacher:
    with _options_of_teacher():
        loaded = _teacher_file(options, slim)
        _ = loaded.model
        # A file alone states no preprocessing; it is taken to have that of the slim file.
        alone = loaded.record is None and loaded.header is not None and loaded.header.config is None
        own = preprocessing if alone else resolve_preprocessing(loaded, options)
    _check_fits(loaded, classifier_size(student), preprocessing.input_size)
    device = next(student.parameters()).device
    return Teacher(loaded.model.to(device), own, preprocessing, sha256=loaded.sha256)


@contextmanager
def _options_of_teacher() -> Iterator[None]:
    """Let error messages in this context name the teacher's options, such as ``--teacher-model``."""

    def write(name: str, *value: object) -> str:
        if name == "num_classes":  # an argument of the model: the teacher has no option for it
            return before(_OPTIONS["model_args"], {name: value[0] if value else "N"})
        return before(_OPTIONS.get(name, name), *value)

    with options_written_by(write) as before:
        yield


def _teacher_file(options: FinetuneOptions, slim: Checkpoint) -> Checkpoint:
    """Open the teacher. If its file names no architecture, the architecture of the slim file is used."""
    assert options.teacher is not None
    model, args = options.teacher_model, dict(options.teacher_model_args)
    if model is None and not states_its_model(options.teacher, options.teacher_part):
        model = slim.identity.architecture
        args = {**dense_args(slim.identity), **args}
    return open_checkpoint(options.teacher, model=model, model_args=args or {}, part=options.teacher_part)


@torch.no_grad()
def _check_fits(teacher: Checkpoint, classes: int, size: tuple[int, ...]) -> None:
    teacher_classes = classifier_size(teacher.model)
    if teacher_classes != classes:
        raise CheckpointError(
            f"{option_name('teacher', teacher.source)}: has {teacher_classes} classes, the slim model "
            f"has {classes}; give a teacher with the same classes"
        )
    try:
        teacher.model(torch.zeros(1, *size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{teacher.source}: the teacher fails on the slim model's input size {'x'.join(map(str, size))} "
            f"({str(error).splitlines()[0]:.120}); give the dense model of the slim file"
        ) from error
