"""Reweight: a gain per kept channel, trained on a final plan and merged into the weights at the cut.

Source: the "reweight module to compensate for information loss" of arXiv 2405.20867, abstract; its place and
form are ours: v and hidden gains scale the columns that read the channel, qk gains the rows of W_q.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mhacut.distillation import Distillation
from mhacut.options import Temperature
from mhacut.plan import Plan, UnitPlan
from mhacut.surgery import Anatomy, UnitKey, cut, dissect, temperature_factor

# There are few steps: a shorter memory of the gradients' size than Adam's own.
GAIN_BETAS = (0.9, 0.99)


def plan_gains(
    anatomy: Anatomy, plan: Plan, gains: Mapping[UnitKey, Tensor] | None, temperature: Temperature
) -> dict[UnitKey, Tensor]:
    """Gains as :func:`mhacut.surgery.cut` takes them: 0 where the plan removes, else gain times temperature.

    Args:
        anatomy: of the model.
        plan: which channels stay.
        gains: [heads, dense width] per unit; None is 1 everywhere.
        temperature: of the softmax.
    """
    masked: dict[UnitKey, Tensor] = {}
    for unit_plan in plan:
        unit = anatomy.unit(unit_plan.key)
        gain = torch.ones(unit.heads, unit.width) if gains is None else gains[unit.key]
        kept = torch.tensor(unit_plan.kept, device=gain.device)
        mask = torch.zeros_like(gain).scatter(-1, kept, 1.0)
        masked[unit.key] = (
            mask * gain * temperature_factor(unit, unit_plan.width, temperature, unit_plan.basis)
        )
    return masked


def train_gains(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan,
    start: Mapping[UnitKey, Tensor] | None,
    lesson: Distillation,
    *,
    steps: int,
    lr: float,
    temperature: Temperature,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[UnitKey, Tensor]:
    """Gains for ``plan``, on the CPU, as :func:`mhacut.surgery.cut` takes them.

    Args:
        model: of the dense shape, eval mode, float32; its tensors are left as they are.
        anatomy: of ``model``.
        plan: what is kept.
        start: gains to start from; None starts from 1.
        lesson: what the masked model is taught.
        steps: of Adam, its rate sinking to 0 along a cosine.
        lr: Adam's, at the start.
        temperature: of the softmax.
        progress: called after every step with (step, steps, loss).
    """
    device = next(model.parameters()).device
    units = [anatomy.unit(unit_plan.key) for unit_plan in plan]
    gains = {
        unit.key: nn.Parameter(
            torch.ones(unit.heads, unit.width, device=device)
            if start is None
            else start[unit.key].detach().clone().to(device)
        )
        for unit in units
    }
    optimiser = torch.optim.Adam(gains.values(), lr=lr, betas=GAIN_BETAS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=max(steps, 1))
    for step in range(steps):
        loss = lesson.loss(model, anatomy, plan_gains(anatomy, plan, gains, temperature))
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps, float(loss.detach()))
    with torch.no_grad():
        trained = plan_gains(anatomy, plan, gains, temperature)
    return {key: gain.cpu() for key, gain in trained.items()}


@dataclass(frozen=True)
class Reweighting:
    """What training gains on a slim model did."""

    model: nn.Module
    """With the gains merged; the one given, where they did not help."""
    before: float
    """Divergence (:class:`mhacut.distillation.Divergence`) from the dense model on images the gains were not
    trained on."""
    after: float
    """With the gains, merged or not."""


def reweight(
    slim: nn.Module,
    lesson: Distillation,
    judge: Distillation,
    *,
    steps: int,
    lr: float,
    progress: Callable[[int, int, float], None] | None = None,
) -> Reweighting:
    """Train a gain for every channel of ``slim`` and merge them, if they help on images of ``judge``.

    Args:
        slim: cut, eval mode, float32; left as it is.
        lesson: what it is taught.
        judge: images the gains are judged by.
        steps: of Adam.
        lr: Adam's, at the start.
        progress: called after every step with (step, steps, loss).
    """
    anatomy = dissect(slim)
    whole = Plan(
        tuple(UnitPlan.keep_all(unit.layer, unit.kind, unit.heads, unit.width) for unit in anatomy.units())
    )
    gains = train_gains(
        slim, anatomy, whole, None, lesson, steps=steps, lr=lr, temperature="dense", progress=progress
    )
    tuned = copy.deepcopy(slim)
    cut(tuned, whole, gains)
    before, after = judge.divergence_of(slim), judge.divergence_of(tuned)
    return Reweighting(tuned if after < before else slim, before, after)
