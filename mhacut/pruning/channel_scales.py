"""Channel scales: one factor per channel, trained with the dense model as teacher, merged into the weights.

Source: the "reweight module to compensate for information loss" of arXiv 2405.20867, abstract. Place and form
are ours: scales of v and hidden channels go into the columns that read the channel, those of qk channels into
the rows of W_q.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mhacut.options.prune import Temperature
from mhacut.plan import Plan, UnitKey
from mhacut.pruning.distill import Distillation, minimise
from mhacut.runtime.progress import SILENT, Reporter
from mhacut.surgery.find import PrunableLayers
from mhacut.surgery.mask import temperature_factor
from mhacut.surgery.slice import cut


def plan_channel_scales(
    prunable: PrunableLayers,
    plan: Plan,
    channel_scales: Mapping[UnitKey, Tensor] | None,
    temperature: Temperature,
) -> dict[UnitKey, Tensor]:
    """Return the scales with which :func:`~mhacut.surgery.slice.cut` makes ``plan``, [heads, dense width].

    Args:
        prunable: prunable layers of the model.
        plan: channels that it removes get the scale 0.
        channel_scales: [heads, dense width] per unit, for the channels that stay; None is 1 everywhere.
        temperature: of the softmax.
    """
    masked: dict[UnitKey, Tensor] = {}
    for unit_plan in plan:
        unit = prunable.unit(unit_plan.key)
        scale = torch.ones(unit.heads, unit.width) if channel_scales is None else channel_scales[unit.key]
        kept = torch.tensor(unit_plan.kept, device=scale.device)
        mask = torch.zeros_like(scale).scatter(-1, kept, 1.0)
        factor = temperature_factor(unit, unit_plan.width, temperature, unit_plan.basis)
        masked[unit.key] = mask * scale * factor
    return masked


def with_trained_scales(
    slim: nn.Module,
    prunable: PrunableLayers,
    distillation: Distillation,
    *,
    steps: int,
    lr: float,
    reporter: Reporter = SILENT,
) -> nn.Module:
    """Return a copy of ``slim`` with a trained scale merged into each of its channels.

    Args:
        slim: cut, eval mode, float32; not modified.
        prunable: prunable layers of ``slim``.
        distillation: images to train on.
        steps: optimiser steps.
        lr: learning rate of the first step.
        reporter: advances after every step.
    """
    device = next(slim.parameters()).device
    scales = {
        unit.key: nn.Parameter(torch.ones(unit.heads, unit.width, device=device)) for unit in prunable.units()
    }
    minimise(
        lambda: distillation.masked_loss(slim, prunable, scales),
        scales.values(),
        steps=steps,
        lr=lr,
        reporter=reporter,
    )
    scaled = copy.deepcopy(slim)
    everything = Plan(tuple(unit.keep_first(unit.width) for unit in prunable.units()))
    cut(scaled, everything, {key: scale.detach().cpu() for key, scale in scales.items()}, prunable)
    return scaled
