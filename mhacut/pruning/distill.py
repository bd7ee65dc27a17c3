"""Distillation: the dense model as teacher, and the divergence of another model from it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhacut.options.prune import SearchOptions
from mhacut.plan import UnitKey
from mhacut.pruning.preserve import ANSWERS, Preserved
from mhacut.runtime.device import ordered_attention
from mhacut.runtime.progress import SILENT, Reporter
from mhacut.surgery.find import PrunableLayers
from mhacut.surgery.mask import masked_tensors

ADAM_BETAS = (0.9, 0.99)
"""There are few steps, so Adam's memory of the gradients' size is shorter than its default."""


class Distillation:
    """Images with the teacher's outputs for them: a stream of shuffled batches, and losses on them."""

    def __init__(
        self,
        images: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        options: SearchOptions,
        *,
        preserved: Preserved = ANSWERS,
        amp: bool = False,
    ) -> None:
        """Begin with the first batch.

        Args:
            images: [n, C, H, W], normalised.
            teacher: the dense model's preserved outputs for them, [n, ...].
            labels: [n], or None to do without a cross-entropy.
            options: ``batch_size``, ``seed`` (of the order of images) and ``label_weight`` are used.
            preserved: what these outputs are.
            amp: whether to compute losses under bfloat16 autocast.
        """
        self.images, self.teacher, self.labels = images, teacher, labels
        self.options, self.amp = options, amp
        self.preserved = preserved
        self._batches = _batches(len(images), options.batch_size, options.seed)

    def part(self, start: int, stop: int | None) -> Distillation:
        """Return the same on the images from ``start`` to ``stop``, beginning with the first batch."""
        part = copy.copy(self)
        part.images, part.teacher = self.images[start:stop], self.teacher[start:stop]
        part.labels = None if self.labels is None else self.labels[start:stop]
        part._batches = _batches(len(part.images), self.options.batch_size, self.options.seed)
        return part

    @torch.no_grad()
    def divergence_of(self, model: nn.Module) -> float:
        """Return the divergence of ``model``, in eval mode, from the teacher, mean over all images."""
        return self.divergence_and_agreement(model)[0]

    @torch.no_grad()
    def divergence_and_agreement(self, model: nn.Module) -> tuple[float, float | None]:
        """Return the same, and the share of images with the teacher's top-1 class; None for features."""
        device, size = next(model.parameters()).device, self.options.batch_size
        total = same = 0.0
        for start in range(0, len(self.images), size):
            images, teacher = (part[start : start + size].to(device) for part in (self.images, self.teacher))
            outputs = self.preserved.outputs(model, images).float()
            total += float(self.preserved.divergence(outputs, teacher)) * len(images)
            same += float((outputs.argmax(1) == teacher.argmax(1)).sum())
        count, answers = len(self.images), self.preserved.measure == "answers"
        # Rounding makes the divergence of equal outputs less than 0.
        return max(total, 0.0) / count, same / count if answers else None

    def loss(self, model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the loss of ``model`` on the next batch, with ``tensors`` in place of its own.

        The divergence, plus the cross-entropy with labels where there are any.
        """
        device, chosen = next(model.parameters()).device, next(self._batches)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.amp), ordered_attention(device):
            outputs = self.preserved.outputs(model, self.images[chosen].to(device), tensors).float()
        loss = self.preserved.divergence(outputs, self.teacher[chosen].to(device))
        weight = self.options.label_weight
        if self.labels is not None and weight > 0:
            loss = loss + weight * F.cross_entropy(outputs, self.labels[chosen].to(device))
        return loss

    def masked_loss(
        self, model: nn.Module, prunable: PrunableLayers, channel_scales: Mapping[UnitKey, Tensor]
    ) -> Tensor:
        """Return the :meth:`loss` of ``model``, its channels scaled; only scales get gradients."""
        # Detached, weights get no gradients, which would take as much memory again.
        frozen = {name: parameter.detach() for name, parameter in model.named_parameters()}
        return self.loss(model, {**frozen, **masked_tensors(model, prunable, channel_scales)})


@torch.enable_grad()
def minimise(
    loss: Callable[[], Tensor],
    parameters: Iterable[Tensor],
    *,
    steps: int,
    lr: float,
    warm_up: int = 0,
    reporter: Reporter = SILENT,
) -> None:
    """Minimise ``loss`` over ``parameters`` in place, by Adam, until it is no longer finite.

    Callers compare the result on held-out images, and so leave out what diverged.
    """
    optimiser = torch.optim.Adam(parameters, lr=lr, betas=ADAM_BETAS)

    def factor(step: int) -> float:
        return min((step + 1) / max(warm_up, 1), 1.0) * (1 + math.cos(math.pi * step / max(steps, 1))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    for step in range(steps):
        value = loss()
        if not torch.isfinite(value):
            return
        optimiser.zero_grad()
        torch.autograd.backward(value)
        optimiser.step()
        schedule.step()
        reporter.advance(step + 1, steps, f"loss {float(value.detach()):.4f}")


def _batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless shuffled batches of indices, every image once per round."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < size:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:size]
        left = left[size:]
