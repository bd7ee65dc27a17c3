"""Tensors from one layout to another: tokens, maps and heads. B images, N tokens, H heads of d channels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def by_head(x: Tensor, heads: int) -> Tensor:
    """[B, N, H * d] as [B, H, N, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merged(x: Tensor) -> Tensor:
    """[B, H, N, d] as [B, N, H * d]."""
    return x.transpose(-3, -2).flatten(-2)


def as_tokens(x: Tensor) -> Tensor:
    """[B, C, height, width] as [B, N, C]."""
    return x.flatten(2).transpose(1, 2)


def as_map(x: Tensor, size: Sequence[int]) -> Tensor:
    """[B, N, C] as [B, C, height, width] of ``size`` (height, width)."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *size)
