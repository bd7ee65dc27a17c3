"""Attention and MLPs of classes that nobody registered."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mhacut
from helpers.models import relative
from helpers.own_code import Scale
from helpers.plans import random_plan
from mhacut.adapters import structure
from mhacut.plan import Plan
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.mask import masked_tensors, run_with
from mhacut.surgery.slice import cut


class SelfAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x, attn_bias=None):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        attn = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).reshape(b, n, c)))


class Branches(nn.Module):
    def __init__(self, dim, heads, doubled=False):
        super().__init__()
        self.config_heads, self.doubled = heads, doubled
        self.num_heads = heads
        self.values, self.keys, self.queries = (nn.Linear(dim, dim) for _ in range(3))
        self.unify = nn.Linear(dim, dim)

    def forward(self, tokens, mask=None):
        q, k, v = (
            part(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.queries, self.keys, self.values)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if self.doubled:  # no form has this
            y = y + k
        return self.unify(y.transpose(1, 2).flatten(2)), None


class Feed(nn.Module):
    def __init__(self, dim, normed=False):
        super().__init__()
        self.wide, self.narrow = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.normed = normed

    def forward(self, x):
        h = F.gelu(self.wide(x))
        return self.narrow(h / h.norm(dim=-1, keepdim=True) if self.normed else h)


class Layer(nn.Module):
    def __init__(self, dim, attention, feed):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(dim), attention, Scale(dim)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(dim), feed, Scale(dim)

    def forward(self, x):
        y = self.attn(self.norm1(x))
        x = x + self.ls1(y[0] if isinstance(y, tuple) else y)
        return x + self.ls2(self.mlp(self.norm2(x)))


class Vit(nn.Module):
    def __init__(self, attention, feed, dim=32, depth=2):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, 4)
        self.blocks = nn.ModuleList(Layer(dim, attention(dim), feed(dim)) for _ in range(depth))

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return x


FEEDS = {
    "functional": Feed,
    "sequential": lambda dim: nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)),
}
ATTENTION = {"qkv": lambda dim: SelfAttention(dim, 2), "named": lambda dim: Branches(dim, 2)}


def build(attention="qkv", feed="functional"):
    torch.manual_seed(0)
    return Vit(ATTENTION.get(attention, attention), FEEDS.get(feed, feed)).eval().requires_grad_(False)


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_masked_equals_sliced(attention, feed):
    model, x = build(attention, feed), torch.randn(2, 3, 16, 16)
    prunable = find_prunable_layers(model)
    assert [unit.kind for unit in prunable.units()] == ["qk", "v", "hidden"] * 2
    plan, scales = random_plan(prunable, 0)
    masked = run_with(model, masked_tensors(model, prunable, scales), x)
    slim = copy.deepcopy(model)
    cut(slim, plan, scales)
    assert relative(slim(x), masked) < 1e-5
    assert relative(masked, model(x)) > 1e-3


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_model_of_no_library_is_pruned_and_opens_again(attention, tmp_path, monkeypatch):
    model, x = build(attention), torch.randn(24, 3, 16, 16)
    result = mhacut.prune_(model, images=x.split(8), flops="60%", effort="fast")
    assert result.flops_after <= 0.6 * result.flops_before
    assert {unit.kind for unit in result.plan} == {"qk", "v", "hidden"}
    mhacut.save_pruned(model, tmp_path / "part.safetensors")
    monkeypatch.setattr(structure, "_PROVED", {})  # as in a new process
    fresh = build(attention)
    mhacut.apply_pruned(fresh, tmp_path / "part.safetensors")
    assert relative(fresh(x), model(x)) < 1e-6
    exported = torch.export.export(model, (x[:2],)).module()
    assert relative(exported(x[:2]), model(x[:2])) < 1e-5


class Encoder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 32, 4, 4)
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(self.patch_embed(x).flatten(2).mT)


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_of_torch_is_cut_in_attention_and_mlps(norm_first, tmp_path):
    torch.manual_seed(0)
    model, x = Encoder(norm_first=norm_first).eval().requires_grad_(False), torch.randn(24, 3, 16, 16)
    dense, fresh = model(x), copy.deepcopy(model)
    whole = copy.deepcopy(model)
    units = find_prunable_layers(whole).units()
    cut(whole, Plan(tuple(unit.keep_first(unit.width) for unit in units)))
    assert relative(whole(x), dense) < 1e-5
    result = mhacut.prune_(model, "", images=x.split(8), flops="70%", effort="fast")
    assert {unit.kind for unit in result.plan} == {"qk", "v", "hidden"}
    mhacut.save_pruned(model, tmp_path / "part.safetensors")
    mhacut.apply_pruned(fresh, tmp_path / "part.safetensors")
    assert relative(fresh(x), model(x)) < 1e-6


@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention_takes_masks_as_torch_does(batch_first):
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(16, 2, batch_first=batch_first).eval().requires_grad_(False)
    model = nn.Sequential(OrderedDict(attn=copy.deepcopy(dense)))
    units = find_prunable_layers(model).units()
    cut(model, Plan(tuple(unit.keep_first(unit.width) for unit in units)))
    x = torch.randn(3, 5, 16)
    x = x if batch_first else x.transpose(0, 1)
    causal, padding = torch.ones(5, 5, dtype=torch.bool).triu(1), torch.zeros(3, 5, dtype=torch.bool)
    padding[:, 4] = True
    for options in (
        {},
        {"need_weights": False},
        {"attn_mask": causal},
        {"attn_mask": torch.randn(6, 5, 5), "average_attn_weights": False},
        {"attn_mask": causal, "key_padding_mask": padding},
    ):
        expected, weights = dense(x, x, x, **options)
        actual, own = model.attn(x, x, x, **options)
        assert relative(actual, expected) < 1e-5
        assert (own is None) == (weights is None)
        assert own is None or relative(own, weights) < 1e-5


def test_attention_of_no_known_form_stays_and_mlps_are_cut():
    model = build(lambda dim: Branches(dim, 2, doubled=True))
    prunable = find_prunable_layers(model)
    assert [unit.kind for unit in prunable.units()] == ["hidden"] * 2


def test_an_mlp_that_mixes_its_hidden_channels_stays():
    prunable = find_prunable_layers(build("qkv", lambda dim: Feed(dim, normed=True)))
    assert [unit.kind for unit in prunable.units()] == ["qk", "v"] * 2


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("side", [8, 7, 4, 3])
def test_torchvisions_swin_attention_is_cut(version, side):
    """Maps of whole windows, with padding, of a single window, and below a window."""
    from torchvision.models import swin_transformer as swin

    torch.manual_seed(0)
    attention = swin.ShiftedWindowAttention if version == "v1" else swin.ShiftedWindowAttentionV2
    model = nn.Sequential(attention(12, [4, 4], [2, 2], 2)).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) / 3)
    x, prunable = torch.randn(2, side, side, 12).double(), find_prunable_layers(model)
    full, slim = copy.deepcopy(model), copy.deepcopy(model)
    cut(full, Plan(tuple(unit.keep_first(unit.width) for unit in prunable.units())))
    assert relative(full(x), model(x)) < 1e-6
    plan, scales = random_plan(prunable, 0)
    masked = run_with(model, masked_tensors(model, prunable, scales), x)
    cut(slim, plan, scales)
    assert relative(slim(x), masked) < 1e-6


class Weighing(SelfAttention):
    """As in the repository of DINO: the attention weights are returned too."""

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        attn = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).reshape(b, n, c))), attn


def test_attention_that_returns_its_weights_is_cut():
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.LayerNorm(32), Weighing(32, 2)).double().eval(),
        torch.randn(2, 9, 32).double(),
    )
    full, slim, prunable = copy.deepcopy(model), copy.deepcopy(model), find_prunable_layers(model)
    cut(full, Plan(tuple(unit.keep_first(unit.width) for unit in prunable.units())))
    for actual, expected in zip(full(x), model(x), strict=True):
        assert relative(actual, expected) < 1e-6
    cut(slim, random_plan(prunable, 0)[0])
    assert slim(x)[1].shape == (2, 2, 9, 9)
