"""Loss of fine-tuning: distillation from the teacher's outputs and features, and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from mhacut.errors import UsageError, option_name
from mhacut.options.finetune import AugmentationOptions
from mhacut.pruning.preserve import ANSWERS
from mhacut.surgery.find import find_prunable_layers


class Blocks:
    """Outputs of a model's transformer blocks in its latest forward pass."""

    def __init__(self, model: nn.Module, *, frozen: bool = False) -> None:
        """Watch the blocks of ``model``; unless it is ``frozen``, only in passes that are differentiated.

        Outputs of a batch that is only measured would take memory for nothing.
        """
        self.frozen = frozen
        layers = [layer.name for layer in find_prunable_layers(model).layers]
        self.names = tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in layers))
        self.outputs: dict[str, Tensor] = {}
        for name in self.names:
            model.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, arguments: object, output: object) -> None:
            if isinstance(output, Tensor) and (self.frozen or torch.is_grad_enabled()):
                self.outputs[name] = output

        return keep

    @contextmanager
    def taken(self) -> Iterator[dict[str, Tensor]]:
        """Yield the outputs, by block; drop them when the context ends, so that they keep no graph alive."""
        try:
            yield self.outputs
        finally:
            self.outputs = {}

    @torch.enable_grad()
    def shapes(self, model: nn.Module, image: Tensor) -> dict[str, tuple[int, ...]]:
        """Run the blocks' ``model`` on an image [1, C, H, W]; return the shape of each block's output."""
        training = model.training
        model.eval()(image)
        model.train(training)
        with self.taken() as found:
            return {name: tuple(output.shape) for name, output in found.items()}


class Teacher:
    """Frozen model whose outputs the student learns to reproduce for the same images."""

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[Tensor],
        std: Sequence[Tensor],
        *,
        matched: bool,
        sha256: str | None = None,
    ) -> None:
        """Freeze ``model``.

        Args:
            model: the teacher, on the device.
            mean: means per channel, [C], of the student's images and of the teacher's.
            std: standard deviations, likewise.
            matched: whether the outputs of its blocks are needed too.
            sha256: digest of its file.
        """
        self.sha256 = sha256
        self.model = model.eval().requires_grad_(False)
        # images of the student: x = (pixel - m) / s, of the teacher: (pixel - M) / S
        self._scale = (std[0] / std[1]).view(-1, 1, 1)
        self._shift = ((mean[0] - mean[1]) / std[1]).view(-1, 1, 1)
        self._same = bool((self._scale == 1).all()) and bool((self._shift == 0).all())
        self.blocks = Blocks(model, frozen=True) if matched else None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the outputs for images [B, C, H, W] that are normalised for the student."""
        outputs: Tensor = self.model(images if self._same else images * self._scale + self._shift)
        return outputs


class Objective:
    """Loss of one batch, a mean over its images."""

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
        """Set the parts of the loss and their weights.

        With a teacher, the loss is temperature^2 times the divergence of the outputs (Hinton et al.,
        arXiv 1503.02531), plus the weighted cross-entropy and the weighted error of the blocks.

        Args:
            teacher: the teacher; None for labels alone.
            student: the student's blocks, to match with the teacher's; None to leave them out.
            label_weight: weight of the cross-entropy.
            temperature: divisor of both outputs before they are compared.
            feature_weight: weight of the blocks' errors.
            smoothing: label smoothing.
            classes: number of classes; with fewer than two, outputs are compared by their squared error.
        """
        self.teacher, self.student = teacher, student
        self.label_weight, self.feature_weight = label_weight, feature_weight
        self.temperature, self.smoothing = temperature, smoothing
        self.divergence = ANSWERS.divergence if classes > 1 else _relative_error

    def teacher_targets(self, images: Tensor) -> Tensor | None:
        """Return the teacher's outputs for ``images``; None without a teacher."""
        return None if self.teacher is None else self.teacher(images)

    def __call__(self, outputs: Tensor, labels: Tensor | None, teacher_targets: Tensor | None) -> Tensor:
        """Return the loss.

        Args:
            outputs: outputs of the student, [B, classes].
            labels: classes [B], or probabilities of classes [B, classes]; None without labels.
            teacher_targets: outputs of the teacher, [B, classes]; None without one.
        """
        outputs = outputs.float()
        loss = outputs.new_zeros(())
        if teacher_targets is not None:
            t = self.temperature
            loss = loss + t * t * self.divergence(outputs / t, teacher_targets.float() / t)
        if labels is not None and self.label_weight > 0:
            # Probabilities come from timm's mixup, which has smoothed them.
            smoothing = self.smoothing if labels.dim() == 1 else 0.0
            loss = loss + self.label_weight * F.cross_entropy(outputs, labels, label_smoothing=smoothing)
        if self.student is not None and self.teacher is not None and self.teacher.blocks is not None:
            loss = loss + self.feature_weight * self._feature_error(self.student, self.teacher.blocks)
        return loss

    @staticmethod
    def _feature_error(student: Blocks, teacher: Blocks) -> Tensor:
        """Mean over blocks of the :func:`_relative_error` of their outputs."""
        with student.taken() as found, teacher.taken() as wanted:
            errors = [_relative_error(found[name].float(), wanted[name].float()) for name in found]
        return torch.stack(errors).mean()


def _relative_error(outputs: Tensor, teacher: Tensor) -> Tensor:
    """Mean over images of the squared error in units of the teacher's variance of the same image.

    With the variance of the whole batch the loss would depend on how processes share a step's images. A
    single value has no variance within its image; its error has the unit of the output.

    Args:
        outputs: [B, ...].
        teacher: [B, ...].
    """
    error = (outputs - teacher).flatten(1).square().mean(1)
    values = teacher.flatten(1)
    return (error / values.var(1).clamp_min(1e-12) if values.shape[1] > 1 else error).mean()


def check_matching(student: Mapping[str, tuple[int, ...]], teacher: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a :class:`UsageError` unless both have the same blocks, with outputs of the same shapes.

    Args:
        student: shape of each block's output for one image.
        teacher: the same of the teacher.
    """
    if not student or student != teacher:
        both = zip(student.items(), teacher.items(), strict=False)
        alike = len([*takewhile(lambda pair: pair[0] == pair[1], both)])
        found, expected = _described(teacher, alike), _described(student, alike)
        raise UsageError(
            f"{option_name('feature_weight')}: the teacher's blocks ({found}) do not match the slim model's "
            f"({expected}); leave it out"
        )


def _described(shapes: Mapping[str, tuple[int, ...]], place: int) -> str:
    if not shapes:
        return "none with a single output"
    name, shape = list(shapes.items())[min(place, len(shapes) - 1)]
    return f"{len(shapes)}, {name} of shape {'x'.join(map(str, shape[1:]))}"


class Mixing:
    """timm's mixup and cutmix, drawn once per step, so that all parts of a step are mixed alike."""

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
        """Mix images [B, C, H, W] in place, drawing from ``seed``, unless mixup and cutmix are off.

        Returns:
            The images, and the labels: classes [B] as given, or, if images are mixed, [B, classes]; None
            without labels.
        """
        if not self.on:
            return images, labels
        before = np.random.get_state()  # timm draws from numpy's generator
        np.random.seed(seed % 2**32)
        try:
            given = images.new_zeros(len(images), dtype=torch.int64) if labels is None else labels
            mixed, targets = self._mixup(images, given)
        finally:
            np.random.set_state(before)
        return mixed, None if labels is None else targets
