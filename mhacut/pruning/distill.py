"""The dense model as teacher: a stream of batches, and the loss of a masked model on the next one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mhacut.errors import MhacutError
from mhacut.pruning.augment import varied
from mhacut.surgery.find import PrunableLayers, UnitKey
from mhacut.surgery.mask import masked_tensors, run_with


class Divergence:
    """Distance of a model's outputs from the teacher's; a scalar, 0 when equal.

    KL(teacher || model) in nats for classifiers; for models without one, squared error of the features
    relative to their variance.
    """

    def __init__(self, classifier: bool) -> None:
        self.classifier = classifier

    def __call__(self, outputs: Tensor, teacher: Tensor) -> Tensor:
        if self.classifier:
            return F.kl_div(
                outputs.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"
            )
        return (outputs - teacher).square().mean() / teacher.var().clamp_min(1e-12)


class Distillation:
    """The loss of a model under channel scales, batch after shuffled batch."""

    def __init__(
        self,
        images: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        *,
        batch_size: int,
        seed: int,
        label_weight: float,
        classifier: bool,
        amp: bool,
    ) -> None:
        """Prepare to teach.

        Args:
            images: [n, C, H, W], normalised.
            teacher: the dense model's outputs for them, [n, classes].
            labels: [n], or None for distillation only.
            batch_size: images per batch.
            seed: of their order.
            label_weight: of the cross-entropy with labels beside the divergence.
            classifier: whether outputs are class logits.
            amp: bfloat16 autocast.
        """
        self.images, self.teacher, self.labels = images, teacher, labels
        self.label_weight = label_weight if labels is not None else 0.0
        self.divergence = Divergence(classifier)
        self.amp = amp
        self.batch_size, self.seed = batch_size, seed
        self._batches = _batches(len(images), batch_size, seed)

    def part(self, start: int, stop: int | None) -> Distillation:
        """The same on some of the images."""
        part = copy.copy(self)
        part.images, part.teacher = self.images[start:stop], self.teacher[start:stop]
        part.labels = None if self.labels is None else self.labels[start:stop]
        part._batches = _batches(len(part.images), self.batch_size, self.seed)
        return part

    @torch.no_grad()
    def divergence_of(self, model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> float:
        """Divergence of ``model`` from the teacher, mean over all images.

        Args:
            model: eval mode.
            tensors: to use in place of its own, by name.
        """
        device = next(model.parameters()).device
        total = 0.0
        for start in range(0, len(self.images), self.batch_size):
            images, teacher = (part[start : start + self.batch_size] for part in (self.images, self.teacher))
            outputs = run_with(model, tensors or {}, images.to(device)).float()
            total += float(self.divergence(outputs, teacher.to(device))) * len(images)
        return max(total, 0.0) / len(self.images)  # rounding makes less than nothing of equal answers

    def loss(
        self, model: nn.Module, prunable: PrunableLayers, channel_scales: Mapping[UnitKey, Tensor]
    ) -> Tensor:
        """Of ``model`` masked by ``channel_scales`` on the next batch; only the scales are differentiated.

        Raises:
            MhacutError: it is not finite.
        """
        device = next(model.parameters()).device
        chosen = next(self._batches)
        frozen = {name: parameter.detach() for name, parameter in model.named_parameters()}
        with torch.autocast(device.type, torch.bfloat16, enabled=self.amp), _repeatable(device):
            tensors = {**frozen, **masked_tensors(model, prunable, channel_scales)}
            outputs = run_with(model, tensors, self.images[chosen].to(device)).float()
        loss = self.divergence(outputs, self.teacher[chosen].to(device))
        if self.labels is not None and self.label_weight > 0:
            loss = loss + self.label_weight * F.cross_entropy(outputs, self.labels[chosen].to(device))
        return self._checked(loss)

    def varied_loss(self, model: nn.Module, dense: nn.Module, generator: torch.Generator) -> Tensor:
        """Loss of ``model`` on a variation of the next batch, all its weights differentiated.

        Args:
            model: eval mode.
            dense: the teacher, asked for its answer to the varied images. Labels, which are not theirs, are
                left out.
            generator: of :func:`mhacut.pruning.augment.varied`, on the CPU.

        Raises:
            MhacutError: it is not finite.
        """
        device = next(model.parameters()).device
        images = varied(self.images[next(self._batches)], generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.amp), _repeatable(device):
            with torch.no_grad():
                teacher = dense(images).float()
            outputs = model(images).float()
        return self._checked(self.divergence(outputs, teacher))

    def _checked(self, loss: Tensor) -> Tensor:
        if not torch.isfinite(loss):
            raise MhacutError(
                "the model's outputs are not finite on the images of the search; check --mean and --std"
                + (", or go without --amp" if self.amp else "")
            )
        return loss


def _repeatable(device: torch.device) -> AbstractContextManager[None]:
    """On CUDA, the attention kernel whose backward pass sums in a fixed order; on a CPU all do."""
    if device.type != "cuda":
        return nullcontext()
    kernel: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return kernel


def _batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless shuffled index batches, every image once per round."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < size:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:size]
        left = left[size:]
