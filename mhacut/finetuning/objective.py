"""What a slim model is trained for: the teacher's answers, labels, and the teacher's features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from mhacut.errors import UsageError
from mhacut.options.finetune import AugmentationOptions
from mhacut.pruning.distill import Divergence
from mhacut.surgery.find import find_prunable_layers


class Blocks:
    """The outputs of a model's transformer blocks in its latest forward pass."""

    def __init__(self, model: nn.Module) -> None:
        layers = [layer.name for layer in find_prunable_layers(model).layers]
        self.names = tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in layers))
        self.outputs: dict[str, Tensor] = {}
        for name in self.names:
            model.get_submodule(name).register_forward_hook(self._keeper(name))

    def _keeper(self, name: str):  # type: ignore[no-untyped-def]  # a hook, as torch types them
        def keep(module: nn.Module, arguments: object, output: object) -> None:
            if isinstance(output, Tensor):
                self.outputs[name] = output

        return keep

    @contextmanager
    def taken(self) -> Iterator[dict[str, Tensor]]:
        """The outputs, forgotten at the end of the block so that they do not keep a graph alive."""
        try:
            yield self.outputs
        finally:
            self.outputs = {}


class Teacher:
    """A frozen model that answers for the same images."""

    def __init__(
        self, model: nn.Module, mean: Sequence[Tensor], std: Sequence[Tensor], matched: bool
    ) -> None:
        """Freeze ``model``.

        Args:
            model: in eval mode, on the device.
            mean: per channel, of the student's images and of its own.
            std: likewise.
            matched: whether its blocks' outputs are wanted.
        """
        self.model = model.eval().requires_grad_(False)
        # images of the student: x = (pixel - m) / s, of the teacher: (pixel - M) / S
        self._scale = (std[0] / std[1]).view(-1, 1, 1)
        self._shift = ((mean[0] - mean[1]) / std[1]).view(-1, 1, 1)
        self._same = bool((self._scale == 1).all()) and bool((self._shift == 0).all())
        self.blocks = Blocks(model) if matched else None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Outputs for images that are normalised for the student."""
        answer: Tensor = self.model(images if self._same else images * self._scale + self._shift)
        return answer


class Objective:
    """The loss of one batch; a mean over its images."""

    def __init__(
        self,
        *,
        teacher: Teacher | None,
        student: Blocks | None,
        label_weight: float,
        temperature: float,
        feature_weight: float,
        smoothing: float,
        classes: int,
    ) -> None:
        """State what counts how much.

        Args:
            teacher: None for labels alone.
            student: the student's blocks, to match with the teacher's.
            label_weight: of the cross-entropy.
            temperature: of the comparison with the teacher.
            feature_weight: of the blocks' errors.
            smoothing: of labels.
            classes: of the head; 0 for a model that gives features.
        """
        self.teacher, self.student = teacher, student
        self.label_weight, self.feature_weight = label_weight, feature_weight
        self.temperature, self.smoothing = temperature, smoothing
        self.divergence = Divergence(True) if classes > 0 else _relative_error

    def answers(self, images: Tensor) -> Tensor | None:
        """What the teacher says to ``images``."""
        return None if self.teacher is None else self.teacher(images)

    def __call__(self, outputs: Tensor, targets: Tensor | None, answers: Tensor | None) -> Tensor:
        """The loss.

        Args:
            outputs: of the student, [B, classes].
            targets: labels [B], or shares of classes [B, classes]; None without labels.
            answers: of the teacher, like ``outputs``; None without one.
        """
        outputs = outputs.float()
        loss = outputs.new_zeros(())
        if answers is not None:
            t = self.temperature
            loss = loss + t * t * self.divergence(outputs / t, answers.float() / t)
        if targets is not None and self.label_weight > 0:
            # Shares of classes are smoothed where they are mixed.
            smoothing = self.smoothing if targets.dim() == 1 else 0.0
            loss = loss + self.label_weight * F.cross_entropy(outputs, targets, label_smoothing=smoothing)
        if self.student is not None and self.teacher is not None and self.teacher.blocks is not None:
            loss = loss + self.feature_weight * self._feature_error(self.student, self.teacher.blocks)
        return loss

    @staticmethod
    def _feature_error(student: Blocks, teacher: Blocks) -> Tensor:
        """:func:`_relative_error` of the blocks' outputs, mean over blocks."""
        with student.taken() as found, teacher.taken() as wanted:
            errors = [_relative_error(found[name].float(), wanted[name].float()) for name in found]
        return torch.stack(errors).mean()


def _relative_error(outputs: Tensor, teacher: Tensor) -> Tensor:
    """Squared error in units of the teacher's variance, of each image alone, mean over images.

    Not of the whole batch: the loss would depend on how a step's images are shared out among processes.

    Args:
        outputs: [B, ...].
        teacher: likewise.
    """
    error = (outputs - teacher).flatten(1).square().mean(1)
    return (error / teacher.flatten(1).var(1).clamp_min(1e-12)).mean()


def check_matching(student: Blocks, teacher: Blocks) -> None:
    """Raise a :class:`UsageError` unless both have the same blocks."""
    if student.names != teacher.names:
        raise UsageError(
            f"--feature-weight: the teacher's blocks ({len(teacher.names)}, first {teacher.names[0]}) are "
            f"not the slim model's ({len(student.names)}, first {student.names[0]}); leave the flag out"
        )


class Mixing:
    """mixup and cutmix of timm, of a whole step's images alike: one draw per step, whatever its parts."""

    def __init__(self, options: AugmentationOptions, classes: int) -> None:
        self.on = options.mixup > 0 or options.cutmix > 0
        self.classes = classes
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
        """Images mixed as ``seed`` draws, in place, and their targets; as given if nothing is on."""
        if not self.on:
            return images, labels
        before = np.random.get_state()  # what timm draws from
        np.random.seed(seed % 2**32)
        try:
            given = images.new_zeros(len(images), dtype=torch.int64) if labels is None else labels
            mixed, targets = self._mixup(images, given)
        finally:
            np.random.set_state(before)
        return mixed, None if labels is None else targets
