"""Distillation from the dense model."""

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
"""Decay rates of Adam's averages, lower than the defaults, because distillation has few steps."""


class Distillation:
    """Endless shuffled batches of images with the dense model's outputs, and a loss."""

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
        """Take images [n, C, H, W], teacher outputs [n, ...] and class labels [n] or None."""
        self.images, self.teacher, self.labels = images, teacher, labels
        self.options, self.amp = options, amp
        self.preserved = preserved
        self._batches = _batches(len(images), options.batch_size, options.seed)

    def part(self, start: int, stop: int | None) -> Distillation:
        """Return a copy with images ``start`` to ``stop``. The order of batches restarts from the seed."""
        part = copy.copy(self)
        part.images, part.teacher = self.images[start:stop], self.teacher[start:stop]
        part.labels = None if self.labels is None else self.labels[start:stop]
        part._batches = _batches(len(part.images), self.options.batch_size, self.options.seed)
        return part

    @torch.no_grad()
    def divergence_of(self, model: nn.Module) -> float:
        """Return the mean divergence of ``model`` (eval mode) from the teacher over all images."""
        return self.divergence_and_agreement(model)[0]

    @torch.no_grad()
    def divergence_and_agreement(self, model: nn.Module) -> tuple[float, float | None]:
        """Return the mean divergence and, for logits, the share of images with the teacher's top-1 class."""
        device, size = next(model.parameters()).device, self.options.batch_size
        total = same = 0.0
        for start in range(0, len(self.images), size):
            images, teacher = (part[start : start + size].to(device) for part in (self.images, self.teacher))
            outputs = self.preserved.outputs(model, images).float()
            total += float(self.preserved.divergence(outputs, teacher)) * len(images)
            same += float((outputs.argmax(1) == teacher.argmax(1)).sum())
        count, answers = len(self.images), self.preserved.metric == "answers"
        # Rounding makes the divergence of equal outputs less than 0.
        return max(total, 0.0) / count, same / count if answers else None

    def loss(self, model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the loss of ``model`` on the next batch, with ``tensors`` in place of its parameters."""
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
        """Return the :meth:`loss` of ``model`` with scaled channels. Only the scales get gradients."""
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
    """Minimise ``loss`` by Adam with warm-up and cosine decay. Stop early if the loss is not finite."""
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
    """Yield shuffled batches of indices without end. Each index occurs once per epoch."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < size:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:size]
        left = left[size:]
