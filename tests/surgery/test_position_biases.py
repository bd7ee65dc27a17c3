"""Relative position biases of merged tokens: the bias between mean positions."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mhacut
from helpers.models import relative
from mhacut.adapters.softmax_hooks import position_bias
from mhacut.plan import TokenPlan
from mhacut.surgery.merging_blocks import Matcher, _with_position_bias
from mhacut.surgery.token_merging import SizedTokens, merge
from mhacut.surgery.tokens import apply_tokens, merged_of

SMALL = {"depth": 3, "img_size": 64, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "num_classes": 10}
MODELS = {
    "BEiT, mean": ("beit_base_patch16_224", {}),
    "BEiT, class token": ("beitv2_base_patch16_224", {"global_pool": "token"}),
    "BEiT, one table": (
        "beit_base_patch16_224",
        {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "use_abs_pos_emb": False},
    ),
    "BEiT, both tables": ("beit_base_patch16_224", {"use_shared_rel_pos_bias": True}),
    "BEiT, no table": ("beit_base_patch16_224", {"use_rel_pos_bias": False}),
    "MLP, mean": ("vit_relpos_small_patch16_224", {}),
    "MLP, mean beside a class token": ("vit_relpos_base_patch16_clsgap_224", {}),
    "MLP, class token, q/k norms": ("vit_relpos_base_patch16_cls_224", {"qk_norm": True}),
    "MLP of all blocks": ("vit_srelpos_small_patch16_224", {}),
    "norms behind": ("vit_relpos_base_patch16_rpn_224", {}),
    "table, class token": ("vit_relpos_base_patch16_cls_224", {"rel_pos_type": "bias"}),
}
MODELS_WITHOUT = {
    "norms behind, no biases": ("vit_base_patch16_rpn_224", {}),
    "rotary, norms behind": ("eva02_tiny_patch14_224", {"use_post_norm": True, "init_values": None}),
    "class attention": ("cait_xxs24_224", {}),
    "class attention, mean": ("cait_xxs24_224", {"global_pool": "avg"}),
}


def build(name: str, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    architecture, options = (MODELS | MODELS_WITHOUT)[name]
    arguments = {**SMALL, "init_values": 0.5, **options, **changes}
    model = timm.create_model(architecture, **arguments).eval().requires_grad_(False)
    for part in model.modules():
        if isinstance(part, nn.Linear):
            part.weight.normal_(std=part.in_features**-0.5)
            if part.bias is not None:
                part.bias.normal_(std=0.3)
        table = getattr(part, "relative_position_bias_table", None)
        if table is not None:
            table.normal_()
    return model


def smooth_images(count: int) -> Tensor:
    noise = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return noise.repeat_interleave(16, 2).repeat_interleave(16, 3)


@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(sorted(set(MODELS) - {"BEiT, no table"})),
    counts=st.lists(st.integers(1, 8), min_size=1, max_size=3),
)
def test_biases_of_merged_tokens_are_bilinear_between_mean_positions(seed, name, counts):
    model = build(name).double()
    block, prefix = model.blocks[0], model.num_prefix_tokens
    table = getattr(model, "rel_pos_bias", getattr(model, "shared_rel_pos", None))
    shared = None if table is None else getattr(table, "get_bias", table)()
    bias = position_bias(block.attn, shared).reshape(3, prefix + 64, prefix + 64)
    chance = torch.Generator().manual_seed(seed)
    block.matcher, block.unmerge, block.grid = None, "rows", (8, 8)
    x = torch.randn(2, prefix + 64, 48, generator=chance, dtype=torch.float64)
    tokens, before = _with_position_bias(x, block, shared)
    torch.testing.assert_close(before.bias[0], bias)
    for count in counts:
        tokens = merge(tokens, Matcher(count, prefix)(tokens, None), prefix)
    assert isinstance(tokens, SizedTokens)
    _, found = _with_position_bias(tokens, block, shared)
    for image in range(2):
        members = [
            (tokens.token_of_patch[image] == token).nonzero().flatten() for token in range(tokens.x.shape[1])
        ]
        sizes = torch.tensor([len(of) for of in members], dtype=torch.float64)
        expected = torch.stack(
            [torch.stack([slow_bias(bias, prefix, q, k) for k in members], -1) for q in members], 1
        )
        torch.testing.assert_close(found.bias[image], expected + sizes.log())


def slow_bias(bias: Tensor, prefix: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Return the bias [H] between 2 tokens with members ``queries`` and ``keys`` on a grid of 8 x 8."""
    if int(queries[0]) < prefix or int(keys[0]) < prefix:
        return bias[:, queries[0], keys[0]]
    rows, columns = ((queries - prefix) // 8, (queries - prefix) % 8)
    down = float(rows.double().mean() - ((keys - prefix) // 8).double().mean())
    along = float(columns.double().mean() - ((keys - prefix) % 8).double().mean())
    total = torch.zeros(3, dtype=torch.float64)
    for row in (math.floor(down), math.floor(down) + 1):
        for column in (math.floor(along), math.floor(along) + 1):
            weight = max(0, 1 - abs(down - row)) * max(0, 1 - abs(along - column))
            if weight:
                query = max(row, 0) * 8 + max(column, 0) + prefix
                key = max(-row, 0) * 8 + max(-column, 0) + prefix
                total += weight * bias[:, query, key]
    return total


@pytest.mark.parametrize("name", MODELS | MODELS_WITHOUT)
@pytest.mark.parametrize("unmerge", [False, True])
def test_zero_merges_give_the_outputs_of_the_model(name, unmerge):
    model, merging, x = build(name), build(name), torch.randn(2, 3, 64, 64)
    apply_tokens(merging, TokenPlan(None, (16, 8, 0), unmerge))
    assert relative(merging(x), model(x)) > 1e-4
    for block in merging.blocks[:2]:
        block.matcher.count = 0
    assert relative(merging(x), model(x)) < 1e-5
    if unmerge:
        expected, found = (m.forward_intermediates(x)[1][1] for m in (model, merging))
        assert relative(found, expected) < 1e-5
    merging.blocks[0].matcher.count = 1
    apply_tokens(merging, TokenPlan())
    assert merged_of(merging) == ()
    assert relative(merging(x), model(x)) < 1e-6


@pytest.mark.parametrize("name", MODELS | MODELS_WITHOUT)
def test_merges_of_equal_tokens_change_nothing(name):
    model = build(name)
    for part in model.modules():  # all pairs of patches get the same bias
        if hasattr(part, "relative_position_bias_table") and part.relative_position_bias_table is not None:
            table = part.relative_position_bias_table
            patches = 15**2  # the entries behind belong to the class token
            table[:patches] = table[:1]
        if hasattr(part, "rel_coords_log"):
            part.rel_coords_log.fill_(0.7)
    if getattr(model, "pos_embed", None) is not None:
        model.pos_embed[:, -64:] = model.pos_embed[:, -1:]
    if getattr(model, "rope", None) is not None:
        model.rope.pos_embed.copy_(model.rope.pos_embed[5].clone())
    x = torch.randn(2, 3, 8, 8).repeat(1, 1, 8, 8)
    expected = model(x)
    for unmerge in (False, True):
        merging = copy.deepcopy(model)
        apply_tokens(merging, TokenPlan(None, (32, 16, 4), unmerge))
        assert relative(merging(x), expected) < 1e-4


@pytest.mark.parametrize(
    ("name", "width", "flops"),
    [
        ("BEiT, class token", 96, "40%"),
        ("MLP, mean", 96, "40%"),
        ("MLP of all blocks", 96, "40%"),
        ("class attention", 48, "25%"),
    ],
)
def test_a_model_is_pruned_with_merges_and_opens_again(name, width, flops, tmp_path):
    model, x = build(name, embed_dim=width), smooth_images(24)
    options = {"scope": "attention+mlp+tokens", "effort": "fast", "tuning_steps": 0, "heal_steps": 0}
    result = mhacut.prune_(model, images=x.split(8), flops=flops, **options)
    assert sum(result.plan.tokens.merged) > 0
    mhacut.save_pruned(model, tmp_path / "slim.safetensors")
    opened = build(name, embed_dim=width)
    mhacut.apply_pruned(opened, tmp_path / "slim.safetensors")
    assert relative(opened(x), model(x)) < 1e-5
