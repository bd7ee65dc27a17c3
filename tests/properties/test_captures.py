"""What activation hooks capture of layers whose channels pass in an order or a module of their own."""

from __future__ import annotations

import pytest
import torch
from timm.models.cpubone import ConvAttention
from torch import Tensor, nn

from helpers.models import double, relative
from helpers.plans import kill
from mhacut.plan import Plan, UnitPlan
from mhacut.surgery.channels import effective_output_weights
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.hooks import capturing
from properties.cases import CASES


@pytest.mark.parametrize(
    "name",
    [
        "efficientvit_mit.LiteMLA",
        "efficientvit_msra.CascadedGroupAttention",
        "swiftformer.EfficientAdditiveAttention",
        "bottleneck_attn.BottleneckAttn",
        "halo_attn.HaloAttn",
    ],
)
@torch.no_grad()
def test_a_channel_that_is_made_of_nothing_is_captured_as_nothing(name):
    model, x = double(CASES[name])
    prunable = find_prunable_layers(model)
    (unit,) = (unit for unit in prunable.units(("qk",)) if unit.layer == "layer")
    kept = torch.arange(unit.width)[1:].expand(unit.heads, -1).tolist()
    plan = Plan((UnitPlan("layer", "qk", unit.width, tuple(map(tuple, kept))),))
    kill(model, prunable, plan, ())
    with capturing(model, (unit,), lambda unit, hook, channels: captured.update({hook: channels})):
        captured: dict[str, Tensor] = {}
        model(x)
    for hook in ("query", "key"):
        assert captured[hook].shape[-2:] == (unit.heads, unit.width) or unit.heads == 1
        assert not captured[hook][..., 0].any()
        assert captured[hook][..., 1:].flatten(0, -2).any(0).all()


@pytest.mark.parametrize("stride", [1, 2, 3])
@torch.no_grad()
def test_the_output_weights_of_a_transposed_convolution_are_those_of_one_place(stride):
    layer = ConvAttention(12, att_stride=stride, fuse_out_proj=True).double()
    (unit,) = find_prunable_layers(nn.ModuleDict({"layer": layer})).units(("v",))
    assert unit.output_projection.tensor == "upsampling.weight"
    found = effective_output_weights(layer, unit).square().sum(0)
    for channel in range(unit.heads * unit.width):
        x = torch.zeros(1, unit.heads * unit.width, 5, 5, dtype=torch.float64)
        x[0, channel, 2, 2] = 1
        moved = layer.upsampling(x) - layer.upsampling(torch.zeros_like(x))
        # There are stride ** 2 places of the output for each of the input.
        assert float(found[channel]) == pytest.approx(float(moved.square().sum()) / stride**2)


@pytest.mark.parametrize(
    "name", ["vision_transformer.ParallelScalingBlock, biases", "vision_transformer.DiffParallelScalingBlock"]
)
@torch.no_grad()
def test_the_output_weights_of_a_parallel_block_are_what_it_adds(name):
    (model, _), x = double(CASES[name]), torch.randn(2, 5, 12, dtype=torch.float64)
    unit = next(unit for unit in find_prunable_layers(model).units(("hidden",)) if unit.layer == "layer")
    hook, before = unit.hooks["hidden"], model.layer(x)
    handle = model.layer.get_submodule(hook.module).register_forward_pre_hook(
        lambda module, args: (torch.cat([args[0][..., : hook.offset], args[0][..., hook.offset :] + 1], -1),)
    )
    moved = model.layer(x) - before
    handle.remove()
    assert relative(moved, effective_output_weights(model.layer, unit).sum(1).expand_as(moved)) < 1e-10
