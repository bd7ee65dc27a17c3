"""Attention of FLatten-CSWin: branches of focused linear attention, or of softmax in stripes of the map.

Every branch adds LePE (Dong et al., CVPR 2022, arXiv 2107.00652): a depthwise 3x3 convolution ``get_v`` of
the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import use_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

from mhacut.errors import UsageError
from mhacut.flatten.attention import (
    DWC_KERNEL,
    FOCUSING_FACTOR,
    FocusedLinearAttention,
    Grid,
    convolve_channels,
    merge_heads,
    split_heads,
    split_qkv,
)


class FocusedLepeAttention(FocusedLinearAttention):
    """Focused linear attention plus LePE over the whole map, without projections."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: Grid,
        *,
        focusing_factor: int = FOCUSING_FACTOR,
        kernel_size: int = DWC_KERNEL,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, grid_size, focusing_factor=focusing_factor, **dd)
        self.get_v = _lepe(dim, **dd)
        self._add_dwc(dim, kernel_size, **dd)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend: [B, N, C_qk], [B, N, C_qk], [B, N, C_v] to [B, N, C_v]."""
        return self.attend(q, k, v) + convolve_channels(v, self.get_v, self.grid_size)


class StripeAttention(nn.Module):
    """Softmax attention within stripes of the map, plus LePE within each stripe.

    Args:
        dim: channels of q, k and v in this branch: all or half of the block's.
        num_heads: heads of this branch.
        grid_size: height and width of the map.
        stripe: height and width of a stripe; stripes tile the map.
        attn_drop: dropout of the attention weights.
        device: as in torch.
        dtype: as in torch.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: Grid,
        stripe: Grid,
        *,
        attn_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.grid_size, self.stripe = num_heads, grid_size, stripe
        self.scale = (dim // num_heads) ** -0.5
        self.fused_attn = use_fused_attn()
        self.get_v = _lepe(dim, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend: [B, N, C_qk], [B, N, C_qk], [B, N, C_v] to [B, N, C_v]."""
        q, k, v = (self._to_stripes(tokens) for tokens in (q, k, v))  # (B * stripes, tokens, C)
        lepe = convolve_channels(v, self.get_v, self.stripe)
        q, k, v = (split_heads(tokens, self.num_heads) for tokens in (q, k, v))
        out = self.attend_within(q, k, v)
        return self._from_stripes(merge_heads(out) + lepe)

    def attend_within(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention within each stripe, [B * stripes, h, tokens, d]."""
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        weights: Tensor = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.attn_drop(weights) @ v

    def _to_stripes(self, tokens: Tensor) -> Tensor:
        (height, width), (high, wide) = self.grid_size, self.stripe
        tiles = tokens.reshape(tokens.shape[0], height // high, high, width // wide, wide, tokens.shape[-1])
        return tiles.transpose(2, 3).flatten(0, 2).flatten(1, 2)  # (B * stripes, tokens, C)

    def _from_stripes(self, tokens: Tensor) -> Tensor:
        (height, width), (high, wide) = self.grid_size, self.stripe
        tiles = tokens.reshape(-1, height // high, width // wide, high, wide, tokens.shape[-1])
        return tiles.transpose(2, 3).flatten(1, 4)  # (B, N, C)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, grid_size={self.grid_size}, stripe={self.stripe}"


Branch = FocusedLepeAttention | StripeAttention


class CswinAttention(nn.Module):
    """Branches of attention between one input and one output projection: tokens [B, N, C] to [B, N, C].

    Each branch has an equal part of the heads: branch b of ``attns`` takes the b-th part of q, k and v.
    """

    def __init__(
        self,
        dim: int,
        attns: Sequence[Branch],
        *,
        qkv_bias: bool,
        proj_drop: float,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_heads = sum(attn.num_heads for attn in attns)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.attns = nn.ModuleList(attns)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        qkv = split_qkv(self.qkv(x), self.proj.in_features)
        branches = zip(*(part.chunk(len(self.attns), dim=-1) for part in qkv), strict=True)
        attended = [attn(q, k, v) for attn, (q, k, v) in zip(self.attns, branches, strict=True)]
        return self.proj_drop(self.proj(torch.cat(attended, dim=-1)))


def linear_branches(dim: int, num_heads: int, grid: Grid, **kwargs: Any) -> list[Branch]:
    """Make the one branch of a linear block; ``kwargs`` are those of :class:`FocusedLepeAttention`."""
    return [FocusedLepeAttention(dim, num_heads, grid, **kwargs)]


def stripe_branches(
    dim: int, num_heads: int, grid: Grid, *, split_size: int | None, **kwargs: Any
) -> list[Branch]:
    """Make the branches of a softmax block: one of vertical and one of horizontal stripes, or a single one.

    Args:
        dim: channels of the block.
        num_heads: heads of the block.
        grid: height and width of the map.
        split_size: width of the stripes, in tokens; None, or the side of a square map, for one branch over
            the whole map.
        kwargs: those of :class:`StripeAttention`.

    Raises:
        UsageError: the stripes do not tile the map.
    """
    height, width = grid
    if split_size is None or grid == (split_size, split_size):
        return [StripeAttention(dim, num_heads, grid, grid, **kwargs)]
    if split_size < 1 or height % split_size or width % split_size:
        raise UsageError(
            f"split_size {split_size}: stripes of this width do not tile a map of {height}x{width} tokens; "
            "give an img_size or a split_size that fits"
        )
    return [
        StripeAttention(dim // 2, num_heads // 2, grid, stripe, **kwargs)
        for stripe in ((height, split_size), (split_size, width))
    ]


def _lepe(dim: int, device: Any = None, dtype: Any = None) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
