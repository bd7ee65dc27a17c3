"""Short tuning of all weights of a slim model, with the dense model as teacher. Ours.

Not fine-tuning: a few steps at a low learning rate on the calibration images.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from mhacut.pruning.distill import Distillation, minimise
from mhacut.runtime.progress import SILENT, Reporter


def tuned(
    slim: nn.Module,
    dense: nn.Module,
    distillation: Distillation,
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    reporter: Reporter = SILENT,
) -> nn.Module:
    """Return a copy of ``slim`` trained to reproduce the outputs of ``dense``.

    Images are varied (:func:`mhacut.pruning.augment.varied`) and the teacher runs on the varied images, so
    that a few hundred images are not learned by heart.

    Args:
        slim: cut, eval mode, float32; not modified.
        dense: the teacher, eval mode, on the same device.
        distillation: images to train on.
        steps: optimiser steps.
        lr: learning rate of the first step. It must be low: a few hundred images are soon overfitted.
        seed: of the variations.
        reporter: advances after every step.
    """
    model = copy.deepcopy(slim).requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    minimise(
        lambda: distillation.varied_loss(model, dense, generator),
        model.parameters(),
        steps=steps,
        lr=lr,
        reporter=reporter,
    )
    return model.requires_grad_(False)
