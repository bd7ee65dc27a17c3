"""Focused linear attention of the FLatten Transformers: gates, shared filters, what may be rotated."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call

from helpers.flatten import FLATTEN
from helpers.models import build, double, relative
from helpers.plans import random_plan
from mhacut.errors import PlanError
from mhacut.flatten.attention import focus, scale_with_gate
from mhacut.plan import Plan, UnitPlan
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.mask import masked_tensors
from mhacut.surgery.slice import cut
from properties.cases import CASES

seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("name", FLATTEN)
def test_what_is_allowed_in_focused_attention(name):
    prunable = find_prunable_layers(build(FLATTEN[name]))
    focused = [unit for unit in prunable.units(["qk"]) if unit.linear]
    assert focused
    for qk in focused:
        v = prunable.unit((qk.layer, "v"))
        assert qk.mixing == "select"
        assert v.mixing == "refit"
        assert not qk.softmax_scaled
        assert (v.sharing == "copied") == (v.heads > 1)
        assert qk.scale_axes == ()


def test_softmax_beside_it_may_be_rotated_where_nothing_acts_on_single_channels():
    allowed = {}
    cases = {name: FLATTEN[name] for name in ("flatten_swin_tiny_224", "flatten_cswin_tiny_224")}
    cases |= {"timm pvt": CASES["pvt_v2.Attention"]}
    for name, case in cases.items():
        units = [unit for unit in find_prunable_layers(build(case)).units(("qk", "v")) if not unit.linear]
        allowed[name] = {
            (unit.kind, unit.mixing == "rotate") for unit in units if unit.softmax_scaled or unit.kind == "v"
        }
    assert ("qk", True) in allowed["flatten_cswin_tiny_224"]
    assert ("v", True) not in allowed["flatten_cswin_tiny_224"]
    assert ("v", True) in allowed["flatten_swin_tiny_224"]
    assert allowed["timm pvt"] == {("qk", True), ("v", True)}


@torch.no_grad()
def test_own_positions_need_filters_of_their_own():
    model, x = double(FLATTEN["flatten_deit_tiny"])
    unit = find_prunable_layers(model).unit(("blocks.0.attn", "v"))
    own = tuple((head, head + 2) for head in range(unit.heads))
    with pytest.raises(PlanError, match=r"its heads share dwc\.weight, dwc\.bias but"):
        cut(model, Plan((UnitPlan(unit.layer, "v", unit.width, own),)))
    equal = UnitPlan(unit.layer, "v", unit.width, ((1, 4),) * unit.heads)
    shared, unshared = copy.deepcopy(model), copy.deepcopy(model)
    cut(shared, Plan((equal,)))
    assert shared.blocks[0].attn.dwc.weight.shape[0] == 2
    cut(unshared, Plan((UnitPlan(unit.layer, "v", unit.width, equal.kept, unshared=True),)))
    assert unshared.blocks[0].attn.dwc.weight.shape[0] == 2 * unit.heads
    assert relative(shared(x), unshared(x)) < 1e-12
    with pytest.raises(PlanError, match="its heads share no tensor"):
        cut(model, Plan((UnitPlan("blocks.0.mlp", "hidden", 192, ((0,),), unshared=True),)))


@given(seed=seeds, channels=st.integers(2, 9), power=st.sampled_from([2, 3, 4]))
@torch.no_grad()
def test_a_gate_is_as_if_channels_were_not_there(seed, channels, power):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 5, channels, generator=generator, dtype=torch.float64)
    q[0] = k[1] = -1  # nothing passes the ReLU: only what is added after it is left
    scale = torch.randn(1, 1, channels, generator=generator, dtype=torch.float64)
    gate = 0.5 + torch.rand(channels, generator=generator, dtype=torch.float64)
    gate[torch.randperm(channels, generator=generator)[: channels - 1 - seed % (channels - 1)]] = 0
    kept = gate > 0
    merged = scale_with_gate(scale, gate, power)[..., kept]
    products = (gate * focus(q[None], scale, power, gate)) @ focus(k[None], scale, power, gate).mT
    expected = focus(q[None, :, kept], merged, power) @ focus(k[None, :, kept], merged, power).mT
    torch.testing.assert_close(products, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["flatten_pvt_v2_b0", "flatten_cswin_tiny_224"])
@torch.no_grad()
def test_scales_that_were_trained_away_leave_nothing_of_a_kept_channel(name):
    model, x = double(FLATTEN[name])
    prunable = find_prunable_layers(model)
    plan, channel_scales = random_plan(prunable, 3)
    for unit in prunable.units():
        if unit.width > 2:
            channel_scales[unit.key][:, :2] *= torch.tensor([0.0, -0.5], dtype=torch.float64)
    masked = functional_call(model, masked_tensors(model, prunable, channel_scales), (x,))
    cut(model, plan, channel_scales)
    assert relative(model(x), masked) < 1e-9
