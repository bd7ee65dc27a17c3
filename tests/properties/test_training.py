"""Slim models train like dense models."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from helpers.models import build, image, relative
from helpers.plans import random_plan
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.mask import masked_tensors
from mhacut.surgery.slice import cut


def untrained(model: nn.Module, x: Tensor) -> set[str]:
    """Parameters without a finite gradient in training mode; some of timm's models have such."""
    model.train()
    model(x).square().sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}


def test_gradients_and_scales_in_training_mode(case):
    whole, x = build(case, dtype=torch.float64), image(case, dtype=torch.float64)
    prunable = find_prunable_layers(whole)
    plan, scales = random_plan(prunable, 5)

    # Channels that are masked have gradients: the search can take them back.
    masks = {key: scale.requires_grad_() for key, scale in scales.items()}
    functional_call(whole, masked_tensors(whole, prunable, masks), (x,)).square().sum().backward()
    for key, scale in masks.items():
        assert scale.grad.isfinite().all(), key
        if type(whole).__name__.startswith("Flatten"):  # features of q or k may be nowhere positive
            assert (scale.grad != 0).double().mean() > 0.9, key

    dense, slim = (build(case, dtype=torch.float64) for _ in range(2))
    cut(slim, plan)
    assert untrained(slim, x) == untrained(dense, x)

    # A batch norm that looks at the batch undoes what is done to the rows before it.
    whole = build(case, dtype=torch.float64).requires_grad_(False).train()
    for module in whole.modules():
        if type(module).__name__.startswith(("Drop", "Stochastic")):
            module.eval()
    scales = {key: scale.detach() for key, scale in masks.items()}
    with torch.no_grad():
        masked = functional_call(copy.deepcopy(whole), masked_tensors(whole, prunable, scales), (x,))
        cut(whole, plan, scales)
        assert relative(whole(x), masked) < 1e-9
