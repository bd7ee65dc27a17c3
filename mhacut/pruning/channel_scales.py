"""Reweight: a channel scale per kept channel, trained on a final plan and merged into the weights at the cut.

Source: the "reweight module to compensate for information loss" of arXiv 2405.20867, abstract; its place and
form are ours: v and hidden channel scales scale the columns that read the channel, qk channel scales the
rows of W_q.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mhacut.options.prune import Temperature
from mhacut.plan import Plan, UnitPlan
from mhacut.pruning.distill import Distillation
from mhacut.surgery.find import PrunableLayers, UnitKey, find_prunable_layers
from mhacut.surgery.mask import temperature_factor
from mhacut.surgery.slice import cut

# There are few steps: a shorter memory of the gradients' size than Adam's own.
ADAM_BETAS = (0.9, 0.99)


def plan_channel_scales(
    prunable: PrunableLayers,
    plan: Plan,
    channel_scales: Mapping[UnitKey, Tensor] | None,
    temperature: Temperature,
) -> dict[UnitKey, Tensor]:
    """Gains as :func:`~mhacut.surgery.slice.cut` takes them: 0 where the plan removes.

    Args:
        prunable: of the model.
        plan: which channels stay.
        channel_scales: [heads, dense width] per unit; None is 1 everywhere.
        temperature: of the softmax.
    """
    masked: dict[UnitKey, Tensor] = {}
    for unit_plan in plan:
        unit = prunable.unit(unit_plan.key)
        channel_scale = (
            torch.ones(unit.heads, unit.width) if channel_scales is None else channel_scales[unit.key]
        )
        kept = torch.tensor(unit_plan.kept, device=channel_scale.device)
        mask = torch.zeros_like(channel_scale).scatter(-1, kept, 1.0)
        masked[unit.key] = (
            mask * channel_scale * temperature_factor(unit, unit_plan.width, temperature, unit_plan.basis)
        )
    return masked


def train_channel_scales(
    model: nn.Module,
    prunable: PrunableLayers,
    plan: Plan,
    start: Mapping[UnitKey, Tensor] | None,
    distillation: Distillation,
    *,
    steps: int,
    lr: float,
    temperature: Temperature,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[UnitKey, Tensor]:
    """Gains for ``plan``, on the CPU, as :func:`mhacut.surgery.slice.cut` takes them.

    Args:
        model: of the dense shape, eval mode, float32; its tensors are left as they are.
        prunable: of ``model``.
        plan: what is kept.
        start: channel scales to start from; None starts from 1.
        distillation: what the masked model is taught.
        steps: of Adam, its rate sinking to 0 along a cosine.
        lr: Adam's, at the start.
        temperature: of the softmax.
        progress: called after every step with (step, steps, loss).
    """
    device = next(model.parameters()).device
    units = [prunable.unit(unit_plan.key) for unit_plan in plan]
    channel_scales = {
        unit.key: nn.Parameter(
            torch.ones(unit.heads, unit.width, device=device)
            if start is None
            else start[unit.key].detach().clone().to(device)
        )
        for unit in units
    }
    optimiser = torch.optim.Adam(channel_scales.values(), lr=lr, betas=ADAM_BETAS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=max(steps, 1))
    for step in range(steps):
        loss = distillation.loss(
            model, prunable, plan_channel_scales(prunable, plan, channel_scales, temperature)
        )
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps, float(loss.detach()))
    with torch.no_grad():
        trained = plan_channel_scales(prunable, plan, channel_scales, temperature)
    return {key: channel_scale.cpu() for key, channel_scale in trained.items()}


@dataclass(frozen=True)
class Reweighting:
    """What training channel scales on a slim model did."""

    model: nn.Module
    """With the channel scales merged; the one given, where they did not help."""
    before: float
    """Divergence (:class:`~.distill.Divergence`) from the dense model on images the channel scales were not
    trained on."""
    after: float
    """With the channel scales, merged or not."""


def reweight(
    slim: nn.Module,
    distillation: Distillation,
    judge: Distillation,
    *,
    steps: int,
    lr: float,
    progress: Callable[[int, int, float], None] | None = None,
) -> Reweighting:
    """Train a gain for every channel of ``slim`` and merge them, if they help on images of ``judge``.

    Args:
        slim: cut, eval mode, float32; left as it is.
        distillation: what it is taught.
        judge: images the channel scales are judged by.
        steps: of Adam.
        lr: Adam's, at the start.
        progress: called after every step with (step, steps, loss).
    """
    prunable = find_prunable_layers(slim)
    whole = Plan(
        tuple(UnitPlan.keep_all(unit.layer, unit.kind, unit.heads, unit.width) for unit in prunable.units())
    )
    channel_scales = train_channel_scales(
        slim, prunable, whole, None, distillation, steps=steps, lr=lr, temperature="dense", progress=progress
    )
    tuned = copy.deepcopy(slim)
    cut(tuned, whole, channel_scales)
    before, after = judge.divergence_of(slim), judge.divergence_of(tuned)
    return Reweighting(tuned if after < before else slim, before, after)
