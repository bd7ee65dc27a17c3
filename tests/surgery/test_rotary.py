"""Rotary positions of merged tokens: sines and cosines are averaged by size."""

from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import apply_rot_embed_cat
from torch import Tensor

import mhacut
from helpers.models import relative
from mhacut.plan import TokenPlan
from mhacut.surgery.token_merging import Match, SizedTokens, merge
from mhacut.surgery.tokens import apply_tokens, merged_of

SMALL = {"depth": 3, "img_size": 64, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "num_classes": 10}
MODELS = {
    "class token": ("eva02_tiny_patch14_224", {"global_pool": "token"}),
    "mean": ("eva02_tiny_patch14_224", {}),
    "mean, registers": ("vit_small_patch16_dinov3", {}),
    "one scale of layers": ("vit_small_patch16_rope_ape_224", {"init_values": 0.1}),
    "gates, q/k norms": ("eva02_tiny_patch14_224", {"qk_norm": True, "attn_type": "rope"}),
    "attention pooling": ("vit_pe_core_tiny_patch16_384", {}),
}


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    architecture, options = MODELS[name]
    model = timm.create_model(architecture, **SMALL | options).eval().requires_grad_(False)
    for part in model.modules():
        if isinstance(part, torch.nn.Linear):
            part.weight.normal_(std=part.in_features**-0.5)
    for block in model.blocks:  # DINOv3 starts with 1e-5
        for scale in filter(lambda scale: scale is not None, (block.gamma_1, block.gamma_2)):
            scale.fill_(0.5)
    return model


def smooth_images(count: int) -> Tensor:
    noise = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return noise.repeat_interleave(16, 2).repeat_interleave(16, 3)


def slow_logits(q: Tensor, k: Tensor, members: list[list[int]], rope: Tensor, half: bool) -> Tensor:
    """Mean of the rotated products over all pairs of members; q and k [N, d] are those of merged tokens."""
    logits = q.new_zeros(len(q), len(k))
    for i, own in enumerate(members):
        for j, others in enumerate(members):
            products = [
                apply_rot_embed_cat(q[i], rope[a], half=half) @ apply_rot_embed_cat(k[j], rope[b], half=half)
                for a in own
                for b in others
            ]
            logits[i, j] = sum(products) / len(products)
    return logits


@given(seed=st.integers(0, 10**6), half=st.booleans(), count=st.integers(1, 4), prefix=st.integers(0, 3))
def test_logits_of_merged_tokens_are_means_over_pairs_of_members(seed, half, count, prefix):
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(1, prefix + 12, 8, generator=chance, dtype=torch.float64)
    angles = torch.rand(12, 4, generator=chance, dtype=torch.float64) * 6
    angles = torch.cat((angles, angles), -1) if half else angles.repeat_interleave(2, -1)
    rope = torch.cat((angles.sin(), angles.cos()), -1)
    table = torch.cat((rope.new_zeros(prefix, 16), rope))
    tokens = SizedTokens(x, x.new_ones(1, prefix + 12, 1), torch.arange(prefix + 12)[None], table)
    for _ in range(2):
        in_a = (tokens.x.shape[1] - prefix) // 2
        order = torch.randperm(in_a, generator=chance)[None]
        receivers = torch.randint(tokens.x.shape[1] - prefix - in_a, (1, count), generator=chance)
        weights = torch.rand(1, tokens.x.shape[1], 1, generator=chance, dtype=torch.float64) + 0.1
        match = Match(order[:, :count], order[:, count:].sort().values, receivers, weights)
        tokens = merge(tokens, match, prefix)
        count = min(count, (tokens.x.shape[1] - prefix) // 2)
    total = tokens.x.shape[1] - prefix
    members = [
        (tokens.token_of_patch[0, prefix:] == prefix + i).nonzero().flatten().tolist() for i in range(total)
    ]
    q, k = torch.randn(2, total, 8, generator=chance, dtype=torch.float64)
    averaged = tokens.positions[0, prefix:]
    rotated = [apply_rot_embed_cat(part, averaged, half=half) for part in (q, k)]
    torch.testing.assert_close(rotated[0] @ rotated[1].T, slow_logits(q, k, members, rope, half))


@pytest.mark.parametrize("name", MODELS)
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


@pytest.mark.parametrize("name", ["class token", "mean, registers", "attention pooling"])
def test_a_rotary_model_is_pruned_with_merges_and_opens_again(name, tmp_path):
    model, x = build(name), smooth_images(24)
    options = {"images": x.split(8), "effort": "fast", "tuning_steps": 0, "heal_steps": 0}
    result = mhacut.prune_(model, flops="45%", **options)
    assert sum(result.plan.tokens.merged) > 0
    mhacut.save_pruned(model, tmp_path / "slim.safetensors")
    opened = build(name)
    mhacut.apply_pruned(opened, tmp_path / "slim.safetensors")
    assert relative(opened(x), model(x)) < 1e-5
