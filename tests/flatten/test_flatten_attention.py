"""Focused linear attention and CSWin's stripes against slow, obvious references in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from mhacut.flatten.attention import (
    FusedFocusedAttention,
    SeparateFocusedAttention,
    focus,
    linear_attention,
    split_qkv,
)
from mhacut.flatten.flatten_cswin import FocusedLepeAttention, StripeAttention


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module.eval()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_depthwise(v: Tensor, conv: nn.Conv2d, grid: tuple[int, int], filter_of) -> Tensor:
    """Channel c of v, [N, C], as a map through one filter of ``conv``, [N, C]."""
    out = torch.empty_like(v)
    for channel in range(v.shape[1]):
        index = filter_of(channel)
        one = v[:, channel].reshape(1, 1, *grid)
        padding = conv.weight.shape[-1] // 2
        out[:, channel] = F.conv2d(
            one, conv.weight[index][None], conv.bias[index][None], padding=padding
        ).flatten()
    return out


def slow_focused(q: Tensor, k: Tensor, v: Tensor, module) -> Tensor:
    """The N x N way, one image: [N, C_qk], [N, C_qk], [N, C_v] to [N, C_v]."""
    heads, power = module.num_heads, module.focusing_factor

    def phi(x: Tensor) -> Tensor:
        x = (x.clamp(min=0) + 1e-6) / torch.log1p(torch.exp(module.scale[0, 0]))
        rows = [row**power * row.pow(2).sum().sqrt() / (row**power).pow(2).sum().sqrt() for row in x]
        return torch.stack(rows)

    q, k = phi(q), phi(k + module.positional_encoding[0])
    out = []
    for qh, kh, vh in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
        weights = qh @ kh.T / len(k)
        out.append(weights @ vh / (weights.sum(1, keepdim=True) + 1e-6))
    width = v.shape[1] // heads
    return torch.cat(out, 1) + slow_depthwise(v, module.dwc, module.grid_size, lambda c: c % width)


@given(
    heads=st.integers(1, 3),
    qk_width=st.integers(1, 4),
    v_width=st.integers(1, 4),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    power=st.sampled_from([2, 3, 4]),
    fused=st.booleans(),
)
@torch.no_grad()
def test_focused_attention_is_the_quadratic_one(heads, qk_width, v_width, grid, power, fused):
    """Also with other widths for q/k than for v, as a cut leaves them."""
    dim, qk, v = 6 * heads, heads * qk_width, heads * v_width
    module = (FusedFocusedAttention if fused else SeparateFocusedAttention)(
        dim, heads, grid, focusing_factor=power, dtype=torch.float64
    )
    count = grid[0] * grid[1]
    module.scale = nn.Parameter(torch.empty(1, 1, qk, dtype=torch.float64))
    module.positional_encoding = nn.Parameter(torch.empty(1, count, qk, dtype=torch.float64))
    module.dwc = nn.Conv2d(v_width, v_width, 5, padding=2, groups=v_width, dtype=torch.float64)
    module.proj = nn.Linear(v, dim, dtype=torch.float64)
    if fused:
        module.qkv = nn.Linear(dim, 2 * qk + v, dtype=torch.float64)
    else:
        module.q = nn.Linear(dim, qk, dtype=torch.float64)
        module.kv = nn.Linear(dim, qk + v, dtype=torch.float64)
    shaken(module)
    x = tokens(2, count, dim)
    expected = []
    for image in x:
        if fused:
            parts = module.qkv(image).split((qk, qk, v), dim=-1)
        else:
            parts = (module.q(image), *module.kv(image).split((qk, v), dim=-1))
        expected.append(module.proj(slow_focused(*parts, module)))
    torch.testing.assert_close(module(x), torch.stack(expected), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_lepe_is_added_per_channel_of_all_heads():
    module = shaken(FocusedLepeAttention(6, 3, (4, 5), dtype=torch.float64))
    q, k, v = (tokens(2, 20, 6, seed=seed) for seed in range(3))
    expected = torch.stack(
        [
            slow_focused(*parts, module) + slow_depthwise(parts[2], module.get_v, (4, 5), lambda c: c)
            for parts in zip(q, k, v, strict=True)
        ]
    )
    torch.testing.assert_close(module(q, k, v), expected, rtol=1e-10, atol=1e-10)


def test_where_no_channel_is_active_attention_is_finite_and_fades():
    features = focus(torch.full((1, 4, 8), -1.0), torch.zeros(1, 1, 8)).reshape(1, 4, 2, 4).transpose(1, 2)
    v = tokens(1, 2, 4, 3)
    # Every weight is 4 channels of (1e-6 / ln 2)^2, far below the 1e-6 of the denominator.
    weight = 4 * (1e-6 / math.log(2)) ** 2
    expected = v.mean(2, keepdim=True).expand_as(v) * weight / (weight + 1e-6)
    found = linear_attention(features, features, v.float()).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@torch.no_grad()
def test_half_precision_is_computed_in_single():
    module = shaken(FusedFocusedAttention(16, 4, (6, 6))).float()
    x = tokens(1, 36, 16).float()
    q, k, v = split_qkv(module.qkv(x), 16)
    expected = module.attend(q, k, v)
    half = module.half().attend(q.half(), k.half(), v.half())
    assert half.dtype == torch.float16
    assert (half.float() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("grid", [(4, 6), (2, 2)])
@torch.no_grad()
def test_stripes_attend_within_themselves(grid):
    height, width = grid
    for high, wide in itertools.product((1, 2), (1, 2)):
        module = shaken(StripeAttention(6, 2, grid, (high, wide), dtype=torch.float64))
        q, k, v = (tokens(1, height * width, 6, seed=seed) for seed in range(3))
        expected = torch.empty(height, width, 6, dtype=torch.float64)
        maps = [part.reshape(height, width, 6) for part in (q, k, v)]
        for top, left in itertools.product(range(0, height, high), range(0, width, wide)):
            rows, columns = slice(top, top + high), slice(left, left + wide)
            qs, ks, vs = (part[rows, columns].reshape(-1, 6) for part in maps)
            heads = [
                (qs[:, part] @ ks[:, part].T / 3**0.5).softmax(1) @ vs[:, part]
                for part in (slice(0, 3), slice(3, 6))
            ]
            lepe = slow_depthwise(vs, module.get_v, (high, wide), lambda c: c)
            expected[rows, columns] = (torch.cat(heads, 1) + lepe).reshape(high, wide, 6)
        for fused in (True, False):
            module.fused_attn = fused
            torch.testing.assert_close(module(q, k, v)[0], expected.reshape(-1, 6), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_map_of_equally_many_tokens_but_another_form_is_refused():
    module = SeparateFocusedAttention(8, 2, (4, 4))
    with pytest.raises(AssertionError, match="a map of 2x8 tokens, expected 4x4"):
        module(torch.zeros(1, 16, 8), (2, 8))


@torch.no_grad()
def test_the_encoding_is_resized_with_the_map():
    module = shaken(FusedFocusedAttention(8, 2, (4, 4), dtype=torch.float64))
    before = module.positional_encoding.clone()
    module.set_grid_size((4, 4))
    assert torch.equal(module.positional_encoding, before)
    ramp = torch.linspace(0, 1, 4, dtype=torch.float64).repeat(4)  # along the width
    module.positional_encoding.copy_(ramp[None, :, None].expand_as(before))
    module.set_grid_size((2, 8))
    resized = module.positional_encoding.reshape(2, 8, 8)
    torch.testing.assert_close(resized[0], resized[1])
    assert (resized[0, 1:, 0] > resized[0, :-1, 0]).all()
    assert module(torch.zeros(1, 16, 8, dtype=torch.float64)).shape == (1, 16, 8)
