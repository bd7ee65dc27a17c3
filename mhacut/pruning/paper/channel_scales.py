"""Channel scales: one factor per channel, trained with the dense model as teacher, merged into the weights.

Source: the "reweight module to compensate for information loss" of arXiv 2405.20867, abstract. Place and form
are ours: scales of v and hidden channels go into the columns that read the channel, those of qk channels into
the rows of W_q.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from mhacut.plan import Plan
from mhacut.pruning.distill import Distillation, minimise
from mhacut.runtime.progress import SILENT, Reporter
from mhacut.surgery.find import PrunableLayers
from mhacut.surgery.slice import cut


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
