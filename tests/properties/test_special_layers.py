"""Layers that no model of timm has, or that share what others have for themselves."""

from __future__ import annotations

import pytest
import torch
from timm.layers.attention import AttentionRope
from timm.models.coat import FactorAttnConvRelPosEnc
from torch import nn
from torch.func import functional_call

from helpers.models import ModelCase, double, relative
from helpers.plans import random_plan
from mhacut.plan import Plan
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.mask import masked_tensors, run_with
from mhacut.surgery.slice import cut


@pytest.mark.parametrize("half", [False, True], ids=["interleaved", "half"])
@torch.no_grad()
def test_a_gate_beside_turned_channels(half):
    # No model of timm has one.
    torch.manual_seed(0)
    attention = AttentionRope(24, 3, num_prefix_tokens=1, gated=True, rotate_half=half).double().eval()
    model = nn.ModuleDict({"attn": attention})
    x, rope = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(4, 16, dtype=torch.float64)
    prunable = find_prunable_layers(model)
    assert {unit.kind: unit.mixing for unit in prunable.units()} == {"qk": "select", "v": "refit"}
    plan, channel_scales = random_plan(prunable, 1)
    masked = {
        name.removeprefix("attn."): tensor
        for name, tensor in masked_tensors(model, prunable, channel_scales).items()
    }
    expected = functional_call(attention, masked, (x, rope))
    cut(model, plan, channel_scales)
    assert relative(model["attn"](x, rope), expected) < 1e-10


@pytest.mark.parametrize("depths", [(2, 2, 1, 1), (1, 0, 1, 1)], ids=["two", "none"])
@pytest.mark.parametrize("whole", [0, 1, 2])
@torch.no_grad()
def test_layers_that_shared_a_convolution_are_cut_each_by_itself(depths, whole):
    args = {"img_size": 64, "embed_dims": (16,) * 4, "serial_depths": depths, "parallel_depth": 1}
    case = ModelCase("coat_tiny", args)
    model, x = double(case)
    prunable = find_prunable_layers(model)
    plan, channel_scales = random_plan(prunable, 7)
    units = [unit for number, unit in enumerate(plan) if number % 3 != whole]
    plan, channel_scales = Plan(tuple(units)), {unit.key: channel_scales[unit.key] for unit in units}
    expected = run_with(model, masked_tensors(model, prunable, channel_scales), x)
    cut(model, plan, channel_scales)
    assert relative(model(x), expected) < 1e-12
    layers = [module for module in model.modules() if isinstance(module, FactorAttnConvRelPosEnc)]
    for positions in (model.crpe1, model.crpe2, model.crpe3, model.crpe4):
        assert any(layer.crpe is positions for layer in layers)
