"""Every way to the attention output gives the numbers of the slow, obvious one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.layers import Attention
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mhacut.adapters.attend import attend
from mhacut.adapters.registry import ADAPTERS
from mhacut.adapters.softmax import Softmax
from mhacut.plan import Plan, UnitPlan
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.mask import masked_tensors
from mhacut.surgery.slice import cut


def reference(q, k, v, scale, mask):
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for batch in range(q.shape[0]):
        for head in range(q.shape[1]):
            for token in range(q.shape[2]):
                logits = torch.stack([(q[batch, head, token] * key).sum() for key in k[batch, head]]) * scale
                weights = (logits + mask[token]).exp()
                out[batch, head, token] = (weights[:, None] * v[batch, head]).sum(0) / weights.sum()
    return out


@pytest.mark.parametrize("widths", [(8, 8), (5, 8), (8, 3)], ids=str)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("masking", ["none", "additive", "boolean"])
def test_attend_equals_the_reference(widths, fused, masking):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 6, widths[0], generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, 3, 6, widths[1], generator=generator, dtype=torch.float64)
    additive, arguments = torch.zeros(6, 6, dtype=torch.float64), {}
    if masking == "additive":
        additive = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        arguments = {"attn_mask": additive}
    elif masking == "boolean":
        seen = torch.rand(6, 6, generator=generator) > 0.4
        seen.fill_diagonal_(True)
        additive = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~seen, float("-inf"))
        arguments = {"attn_mask": seen}
    found = attend(q, k, v, scale=0.3, fused=fused, **arguments)
    assert torch.allclose(found, reference(q, k, v, 0.3, additive), atol=1e-12)


@pytest.mark.parametrize("widths", [(4, 6), (6, 4)], ids=str)
@pytest.mark.parametrize("mask", [None, (1, 1), (3, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("gradients", [False, True])
def test_two_widths_of_many_images_take_the_products_that_count(widths, mask, gradients):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2, 300, width) for width in (widths[0], *widths)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    if mask is not None:
        mask = torch.randn(*mask, 300, 300, generator=generator, dtype=torch.float64)
    q.requires_grad_(gradients)
    expected = attend(q, k, v, scale=0.3, fused=False, attn_mask=mask)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        found = attend(q, k, v, scale=0.3, fused=True, attn_mask=mask)
    assert torch.allclose(found, expected, atol=1e-12)
    if not gradients:
        assert counter.get_total_flops() == 2 * 3 * 2 * 300 * 300 * sum(widths)


class OneLayer(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.attn = Attention(24, num_heads=3, norm_layer=nn.LayerNorm, **options)

    def forward(self, x):
        return self.attn(x)


OPTIONS = [
    {"gated": True, "qkv_bias": True},
    {"gated": True, "qkv_bias": False},
    {"proj_bias": False},
    {"attn_head_dim": 6, "dim_out": 16},
    {"qk_norm": True},
    {"scale_norm": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_of_timm_attention_are_cut_exactly_or_left_whole(options):
    torch.manual_seed(0)
    model = OneLayer(**options).double().eval()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    prunable = find_prunable_layers(model)
    units, channel_scales = [], {}
    for unit in prunable.units():
        kept = tuple(tuple(sorted(torch.randperm(unit.width)[: unit.width - 2].tolist())) for _ in range(3))
        units.append(UnitPlan(unit.layer, unit.kind, unit.width, kept))
        channel_scales[unit.key] = torch.zeros(3, unit.width, dtype=torch.float64).scatter(
            1, torch.tensor(kept), 1.0
        )
    masked = torch.func.functional_call(model, masked_tensors(model, prunable, channel_scales), (x,))
    slim = copy.deepcopy(model)
    cut(slim, Plan(tuple(units)))
    assert {unit.kind for unit in prunable.units()} | set(prunable.layers[0].not_prunable) == {"qk", "v"}
    # The plan keeps the dense temperature exactly, since no channel scale says otherwise.
    assert torch.allclose(slim(x), masked, atol=1e-12)


SLIM = next(adapter.twin for adapter in ADAPTERS if isinstance(adapter, Softmax) and adapter.cls is Attention)


def test_a_causal_mask_hides_later_tokens_from_a_cut_layer_too():
    model = OneLayer().eval()
    cut(model, Plan((UnitPlan("attn", "qk", 8, ((0, 1, 2),) * 3),)))
    x = torch.randn(2, 5, 24)
    for fused in (False, True):
        model.attn.fused_attn = fused
        out = model.attn(x, is_causal=True)
        for tokens in range(1, 5):
            alone = model.attn(x[:, :tokens], None, True)
            assert torch.allclose(out[:, :tokens], alone, atol=1e-6)


def test_cut_layers_can_be_pickled():
    # Their classes are made from a table; pickle looks for them by name.
    for adapter in ADAPTERS:
        for cls in adapter.module_classes:
            assert pickle.loads(pickle.dumps(cls)) is cls


def test_equal_widths_stay_timms_own_class():
    model = OneLayer()
    plan = [UnitPlan("attn", kind, 8, ((0, 1, 2, 3),) * 3) for kind in ("qk", "v")]
    cut(model, Plan(tuple(plan)))
    assert type(model.attn) is Attention
    cut(model, Plan((UnitPlan("attn", "v", 4, ((0, 1),) * 3),)))
    assert type(model.attn) is SLIM
    cut(model, Plan((UnitPlan("attn", "qk", 4, ((0, 1),) * 3),)))
    assert type(model.attn) is Attention
    assert model.attn.scale == pytest.approx(2**-0.5)
