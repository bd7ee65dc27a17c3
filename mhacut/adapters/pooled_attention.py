"""Attention whose queries are pooled, so that a layer gives fewer tokens than it takes: Hiera, SAM 2's too.

The largest of several queries is taken channel by channel: where that is so, q/k channels are chosen, never
mixed. v channels are free.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from timm.models.hiera import MaskUnitAttention
from timm.models.hieradet_sam2 import MultiScaleAttention
from torch import Tensor

from mhacut.adapters.base import Unit
from mhacut.adapters.fused import FusedAdapter, FusedForward, Tokens, by_head, fused_projection


class SlimMaskUnitAttention(FusedForward, MaskUnitAttention):  # type: ignore[misc]
    """Hiera's attention at any widths."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """[B, N, C] to [B, N / q_stride, C_out]; tokens of a window lie ``windows`` apart."""
        q, k, v = self.heads_of(x)  # (B * windows, H, tokens, d)
        if self.q_stride > 1:
            q = q.unflatten(-2, (self.q_stride, -1)).amax(dim=-3)
        weighed = self.weigh(q, k, v)
        windows = weighed.view(x.shape[0], -1, *weighed.shape[1:])
        out: Tensor = self.finish(windows.transpose(1, 2).flatten(1, 2))
        return out

    def project(self: Any, x: Tensor) -> Tensor:
        """A window as an image of its own."""
        return _windows(self, fused_projection(self, x))


class SlimMultiScaleAttention(FusedForward, MultiScaleAttention):  # type: ignore[misc]
    """SAM 2's attention at any widths."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Maps, [B, H, W, C] to [B, H', W', C_out]."""
        qkv, v_dim = fused_projection(self, x), self.proj.in_features
        qk_dim = (qkv.shape[-1] - v_dim) // 2
        q, k, v = qkv[..., :qk_dim], qkv[..., qk_dim:-v_dim], qkv[..., -v_dim:]
        if self.q_pool is not None:
            q = self.q_pool(q.movedim(-1, 1)).movedim(1, -1)
        weighed = self.weigh(*(by_head(part.flatten(1, 2), self.num_heads) for part in (q, k, v)))
        out: Tensor = self.finish(weighed.view(*q.shape[:3], -1))
        return out


class PooledAdapter(FusedAdapter):
    """What both have in common."""

    def pools(self, module: Any) -> bool:
        """Whether queries are pooled."""
        raise NotImplementedError

    def qk(self, name: str, module: Any) -> Unit | str:
        """Not mixed where queries are pooled."""
        plain = super().qk(name, module)
        if isinstance(plain, str) or not self.pools(module):
            return plain
        return replace(plain, mixing="select")


class MaskUnitAdapter(PooledAdapter):
    """Windows that lie interleaved in a sequence, or one of all tokens."""

    def pools(self, module: Any) -> bool:
        return bool(module.q_stride > 1)

    def tokens(self, module: Any, input_shape: tuple[int, ...]) -> Tokens:
        """Of [B, N, C]."""
        batch, tokens, _ = input_shape
        window = module.q_stride * module.window_size if module.use_mask_unit_attn else tokens
        read = batch * tokens
        return Tokens(read, read // module.q_stride, read // module.q_stride * window)

    def spread(self, module: Any, x: Tensor) -> Tensor:
        """A window as an image of its own."""
        return _windows(module, x)


class MultiScaleAdapter(PooledAdapter):
    """Maps, or windows of one, [B, H, W, C]."""

    def pools(self, module: Any) -> bool:
        return module.q_pool is not None

    def tokens(self, module: Any, input_shape: tuple[int, ...]) -> Tokens:
        """What pooling leaves, the pooling says."""
        batch, height, width, _ = input_shape
        written = height * width
        if module.q_pool is not None:
            written = module.q_pool(torch.empty(1, 1, height, width, device="meta")).numel()
        return Tokens(batch * height * width, batch * written, batch * written * height * width)


def _windows(module: Any, x: Tensor) -> Tensor:
    """[B, N, C] as [B * windows, tokens, C]."""
    if not module.use_mask_unit_attn:
        return x
    windows = x.shape[1] // (module.q_stride * module.window_size)
    return x.view(x.shape[0], -1, windows, x.shape[-1]).transpose(1, 2).flatten(0, 1)


POOLED_ATTENTION = (
    MaskUnitAdapter(MaskUnitAttention, SlimMaskUnitAttention),
    MultiScaleAdapter(MultiScaleAttention, SlimMultiScaleAttention),
)
