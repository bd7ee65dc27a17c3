"""Slim models train as dense ones do."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from helpers.models import build, double, image, relative
from helpers.plans import random_plan
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.mask import masked_tensors
from mhacut.surgery.slice import cut


def untrained(model: nn.Module, x: Tensor) -> set[str]:
    """Parameters that no finite gradient reaches in training mode; timm's models have some."""
    model.train()
    model(x).square().sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}


def test_gradients_flow_in_training_mode(case):
    model, x = build(case, dtype=torch.float64), image(case, dtype=torch.float64)
    before = untrained(copy.deepcopy(model), x)
    plan, _ = random_plan(find_prunable_layers(model), 5)
    cut(model, plan)
    assert untrained(model, x) == before


@torch.no_grad()
def test_scales_survive_training_mode(case):
    # Where a batch norm looks at the batch, it undoes what is done to the rows before it.
    model, x = double(case)
    prunable = find_prunable_layers(model)
    plan, channel_scales = random_plan(prunable, 3)
    model.train()
    for module in model.modules():
        if type(module).__name__.startswith(("Drop", "Stochastic")):
            module.eval()
    masked = functional_call(copy.deepcopy(model), masked_tensors(model, prunable, channel_scales), (x,))
    cut(model, plan, channel_scales)
    assert relative(model(x), masked) < 1e-9


def test_gradients_of_scales_reach_channels_that_are_masked(case):
    # Or the search could never take a channel back.
    model, x = build(case, dtype=torch.float64), image(case, dtype=torch.float64)
    prunable = find_prunable_layers(model)
    _, channel_scales = random_plan(prunable, 9)
    channel_scales = {key: scale.requires_grad_() for key, scale in channel_scales.items()}
    functional_call(model, masked_tensors(model, prunable, channel_scales), (x,)).square().sum().backward()
    for key, scale in channel_scales.items():
        assert scale.grad.isfinite().all(), key
        if type(model).__name__.startswith("Flatten"):  # whose features of q or k may be nowhere positive
            assert (scale.grad != 0).double().mean() > 0.9, key
