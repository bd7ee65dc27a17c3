"""What is left of a cut layer makes up for what went, whatever its class."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from timm.layers.attention import AttentionRope
from torch import nn

from helpers.models import double, relative
from helpers.plans import random_plan
from mhacut.options.prune import SearchOptions
from mhacut.plan import Plan, UnitPlan
from mhacut.pruning.calibrate import calibrate
from mhacut.pruning.candidates import find_candidates
from mhacut.pruning.repair import repair, shrink
from mhacut.pruning.unit_moments import UnitMoments
from mhacut.surgery.channels import channels_of, set_channels
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.slice import cut
from properties.cases import CASES


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("levit.LevitMlp", "ln2.bn"),
        ("shvit.FFN", "pw2.bn"),
        ("efficientformer.ConvMlpWithNorm", "norm2"),
        ("levit.Attention", "proj.ln.bn"),
        ("shvit.SHSA", "proj.1.bn"),
    ],
)
@torch.no_grad()
def test_what_removed_channels_gave_on_average_goes_into_the_norm_behind(name, norm):
    model, x = double(CASES[name], batch=6)
    prunable = find_prunable_layers(model)
    unit = next(unit for unit in prunable.units(("v", "hidden")) if unit.layer == "layer")
    assert unit.output_norm == norm
    plan = Plan((UnitPlan("layer", unit.kind, unit.width, (tuple(range(2)),) * unit.heads),))
    for axis in unit.axes:  # what is to go becomes constant, not zero
        if axis != unit.output_projection and (axis.norm is not None or axis.tensor == "fc1.weight"):
            channels = channels_of(model.layer, unit, axis)
            channels[:, 2:] = 0
            set_channels(model.layer, unit, axis, channels)
    expected, moments = model(x), calibrate(model, prunable, x, batch_size=6).moments
    repair(model, prunable, plan, moments)
    cut(model, plan)
    assert relative(model(x), expected) < 1e-6


MADE_DEAD = [
    "efficientvit_mit.LiteMLA",
    "efficientvit_msra.CascadedGroupAttention",
    "swiftformer.EfficientAdditiveAttention",
    "vision_transformer.ParallelScalingBlock, biases",
    "diff_attention.DiffAttention",
]


@pytest.mark.parametrize("name", MADE_DEAD)
@torch.no_grad()
def test_repaired_or_shrunk_a_cut_is_a_mere_slice(name):
    """Also where channels feed others of the layer, so that it is not enough not to read them."""
    dense, x = double(CASES[name], batch=6)
    prunable = find_prunable_layers(dense)
    plan = random_plan(prunable, 1)[0]
    moments = calibrate(dense, prunable, x, batch_size=6).moments
    model = copy.deepcopy(dense)
    repair(model, prunable, plan, moments)
    repaired = model(x)
    cut(model, plan)
    assert relative(model(x), repaired) < 1e-8
    for unit in prunable.units():
        model = copy.deepcopy(dense)
        module, seen = model.get_submodule(unit.layer), moments[unit.key]
        (candidate, *_) = find_candidates(module, unit, seen, 1, SearchOptions(basis="channel"))
        width = max(1, unit.width // 2)
        shrink(module, unit, candidate, width, seen)
        shrunk = model(x)
        cut(model, Plan((candidate.plan(width),)))
        assert relative(model(x), shrunk) < 1e-8


@pytest.mark.parametrize(
    "name",
    ["cpubone.ConvAttention, fused", "lowformer.ConvAttention, fused", "attention2d.MultiQueryAttention2d"],
)
@torch.no_grad()
def test_repaired_readers_read_what_kept_channels_foretell(name):
    """Of all heads, where they go together; at every place, where a transposed convolution reads."""
    model, x = double(CASES[name], batch=40)
    prunable = find_prunable_layers(model)
    (unit,) = (unit for unit in prunable.units(("v",)) if unit.layer == "layer")
    kept = tuple(range(0, unit.width, 2))
    plan = Plan((UnitPlan("layer", "v", unit.width, (kept,) * unit.heads),))
    hook, inputs = unit.hooks["output"], []
    reader = copy.deepcopy(model.layer.get_submodule(hook.module))
    model.layer.get_submodule(hook.module).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    seen = calibrate(model, prunable, x, batch_size=40).moments[unit.key].every
    # The first pass fits the variance of the outputs.
    rows, stays = torch.cat(inputs[1:]).movedim(1, -1), torch.zeros(unit.heads, unit.width, dtype=torch.bool)
    stays[:, kept] = True
    stays = stays.flatten()
    from_kept = rows[..., stays].flatten(0, -2)
    if unit.constants_pass:
        from_kept = torch.cat([from_kept, torch.ones_like(from_kept[:, :1])], dim=1)
    solution = torch.linalg.lstsq(from_kept, rows[..., ~stays].flatten(0, -2), driver="gelsd").solution
    rows[..., ~stays] = (from_kept @ solution).view(*rows.shape[:-1], -1)
    expected = reader(rows.movedim(-1, 1))
    repair(model, prunable, plan, {unit.key: UnitMoments(seen, seen)})  # judged by what was seen: no ridge
    cut(model, plan)
    assert relative(model.layer.get_submodule(hook.module)(rows[..., stays].movedim(-1, 1)), expected) < 1e-4


@pytest.mark.parametrize("gated", [False, True], ids=["free", "gated"])
@torch.no_grad()
def test_values_that_heads_share_are_refitted_for_each_that_reads_them(gated):
    torch.manual_seed(0)
    attention = AttentionRope(
        24, 4, qkv_fused=False, num_kv_heads=2, num_prefix_tokens=0, gated=gated, dim_out=10
    )
    attention.double().eval().requires_grad_(False)
    model, x = nn.Sequential(OrderedDict(attn=attention)), torch.randn(9, 5, 24).double()
    prunable, read = find_prunable_layers(model), []
    (unit,) = prunable.units()
    attention.proj.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    seen = calibrate(model, prunable, x, batch_size=9).moments[unit.key].every
    rows = torch.cat(read[1:]).view(9, 5, 2, 2, 6)  # (B, N, heads of values, heads of queries, d)
    kept = ((0, 3, 5), (1, 2, 4))
    plan = Plan((UnitPlan("attn", "v", 6, kept),))
    stays = [(head, channel) for head in range(2) for channel in kept[head]]
    goes = [(head, channel) for head in range(2) for channel in range(6) if channel not in kept[head]]
    # Both heads of queries of every head of values at once: one regression for all.
    inputs = torch.stack([rows[:, :, head, :, channel].flatten() for head, channel in stays], 1)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
    wanted = torch.stack([rows[:, :, head, :, channel].flatten() for head, channel in goes], 1)
    solution = torch.linalg.lstsq(inputs, wanted).solution
    before, bias = attention.proj.weight.clone().view(10, 2, 2, 6), attention.proj.bias.clone()
    expected, constant = before.clone(), bias.clone()
    for query in range(2):
        for number, (head, channel) in enumerate(goes):
            lost = before[:, head, query, channel]
            constant += lost * solution[-1, number]
            for place, (other, stayed) in enumerate(stays):
                expected[:, other, query, stayed] += lost * solution[place, number]
            expected[:, head, query, channel] = 0
    repair(model, prunable, plan, {unit.key: UnitMoments(seen, seen)})
    assert relative(attention.proj.weight.view(10, 2, 2, 6), expected) < 1e-5
    assert relative(attention.proj.bias, constant) < 1e-5
    repaired = model(x)
    cut(model, plan)
    assert relative(model(x), repaired) < 1e-12
    assert attention.v_proj.out_features == 2 * 3
