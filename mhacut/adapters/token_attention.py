"""Softmax over tokens in timm's shapes: sequences, maps and windows, with and without a bias of positions.

MetaFormer, FastViT, VOLO, Visformer, DaViT, Twins, NesT, BEiT, CaiT, ConViT, ViT of relative positions. Each
says in what order its tokens lie; the rest is :mod:`mhacut.adapters.fused`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from timm.models import beit, cait, convit, davit, fastvit, metaformer, nest, twins, visformer, volo
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor

from mhacut.adapters.base import ActivationHook, ChannelAxis
from mhacut.adapters.fused import FusedAdapter, FusedForward, Tokens, fused_projection, head_count


class SlimMetaformerAttention(FusedForward, metaformer.Attention):  # type: ignore[misc]
    """MetaFormer's attention at any widths."""


class SlimMhsa(FusedForward, convit.MHSA):  # type: ignore[misc]
    """ConViT's attention without positions at any widths."""


class SlimDavitWindowAttention(FusedForward, davit.WindowAttention):  # type: ignore[misc]
    """DaViT's attention within windows at any widths."""


class SlimTalkingHeadAttn(FusedForward, cait.TalkingHeadAttn):  # type: ignore[misc]
    """CaiT's attention, whose heads are mixed before and after the softmax, at any widths."""

    def weigh(self: Any, q: Tensor, k: Tensor, v: Tensor, *unused: Any, **options: Any) -> Tensor:
        """As of :class:`FusedForward`, with the mixing; there are no biases."""
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, N, N)
        weights = _over_heads(self.proj_l, logits).softmax(dim=-1)
        out: Tensor = self.attn_drop(_over_heads(self.proj_w, weights)) @ v
        return out.transpose(-3, -2).flatten(-2)


def _over_heads(mixing: Any, x: Tensor) -> Tensor:
    mixed: Tensor = mixing(x.movedim(1, -1)).movedim(-1, 1)
    return mixed


class SlimBeitAttention(FusedForward, beit.Attention):  # type: ignore[misc]
    """BEiT's attention at any widths."""

    def forward(self: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """[B, N, C] to [B, N, C]; the layer's own bias of positions and the model's add up."""
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        out: Tensor = self.finish(self.weigh(*self.heads_of(x), bias))
        return out


class SlimRelPosAttention(FusedForward, RelPosAttention):  # type: ignore[misc]
    """Attention with relative positions at any widths."""

    def forward(self: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """[B, N, C] to [B, N, C]; the bias of positions is the layer's own or the model's."""
        q, k, v = self.heads_of(x)
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        out: Tensor = self.finish(self.weigh(self.q_norm(q), self.k_norm(k), v, bias))
        return out


class SlimVoloAttention(FusedForward, volo.Attention):  # type: ignore[misc]
    """VOLO's attention at any widths."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Maps, [B, H, W, C] to [B, H, W, C]."""
        out: Tensor = super().forward(x.flatten(1, 2))
        return out.view(*x.shape[:3], -1)


class SlimFastvitAttention(FusedForward, fastvit.Attention):  # type: ignore[misc]
    """FastViT's attention at any widths."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Maps, [B, C, H, W] to [B, C, H, W]."""
        out: Tensor = super().forward(x.flatten(2).mT)
        return out.mT.reshape(x.shape)


class SlimVisformerAttention(FusedForward, visformer.Attention):  # type: ignore[misc]
    """Visformer's attention, with convolutions of one pixel, at any widths."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Maps, [B, C, H, W] to [B, C, H, W]."""
        weighed = self.weigh(*self.heads_of(x))  # (B, N, H * d_v)
        out: Tensor = self.finish(weighed.mT.reshape(x.shape[0], -1, *x.shape[2:]))
        return out

    def project(self: Any, x: Tensor) -> Tensor:
        """[B, N, q | k | v]."""
        return fused_projection(self, x).flatten(2).mT


class SlimLocallyGroupedAttn(FusedForward, twins.LocallyGroupedAttn):  # type: ignore[misc]
    """Twins' attention within windows at any widths."""

    def forward(self: Any, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """[B, N, C] to [B, N, C] of a map of ``size``, filled up with zeros to whole windows."""
        (height, width), side = size, self.ws
        rows, columns = -(-height // side), -(-width // side)
        grid = F.pad(
            x.view(x.shape[0], height, width, -1), (0, 0, 0, columns * side - width, 0, rows * side - height)
        )
        windows = grid.view(x.shape[0], rows, side, columns, side, -1).transpose(2, 3)
        weighed = self.weigh(*self.heads_of(windows))  # (B * windows, side^2, H * d_v)
        grid = weighed.view(x.shape[0], rows, columns, side, side, -1).transpose(2, 3)
        grid = grid.reshape(x.shape[0], rows * side, columns * side, -1)[:, :height, :width]
        out: Tensor = self.finish(grid.flatten(1, 2))
        return out

    def project(self: Any, x: Tensor) -> Tensor:
        """Of [B, rows, columns, side, side, C], a window as an image of its own."""
        return fused_projection(self, x).flatten(3, 4).flatten(0, 2)


class SlimNestAttention(FusedForward, nest.Attention):  # type: ignore[misc]
    """NesT's attention within blocks at any widths."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """[B, blocks, N, C] to [B, blocks, N, C]; ``proj`` reads channels in the order (d, H)."""
        weighed = self.weigh(*self.heads_of(x))
        by_channel = weighed.view(*x.shape[:3], self.num_heads, -1).transpose(-1, -2).flatten(-2)
        out: Tensor = self.finish(by_channel)
        return out

    def project(self: Any, x: Tensor) -> Tensor:
        """A block as an image of its own."""
        return fused_projection(self, x).flatten(0, 1)


class MapAdapter(FusedAdapter):
    """Attention over a map [B, H, W, C], or [B, C, H, W] where ``channel_dim`` is 1."""

    def __init__(self, dense: Any, slim: Any, *, channel_dim: int = -1, inner_channel_dim: int = -1) -> None:
        """As for :class:`FusedAdapter`; channels of the layer's output, and of what its projections make."""
        super().__init__(dense, slim)
        self.channel_dim, self.inner_channel_dim = channel_dim, inner_channel_dim

    def tokens(self, module: Any, input_shape: tuple[int, ...]) -> Tokens:
        """Of all pixels."""
        pixels = math.prod(input_shape[1:3] if self.channel_dim == -1 else input_shape[2:])
        return super().tokens(module, (input_shape[0], pixels, 0))


class LocallyGroupedAdapter(FusedAdapter):
    """Windows of a map that comes as a sequence."""

    def tokens(self, module: Any, input_shape: tuple[int, ...]) -> Tokens:
        """Of maps that are not square, only if sides are whole windows."""
        batch, tokens, _ = input_shape
        side = math.isqrt(tokens)
        filled = (-(-side // module.ws) * module.ws) ** 2 if side * side == tokens else tokens
        return Tokens(batch * filled, batch * tokens, batch * filled * module.ws**2)

    def spread(self, module: Any, x: Tensor) -> Tensor:
        """A window as an image of its own."""
        return x.flatten(0, 2)


class NestAdapter(FusedAdapter):
    """``proj`` reads channel i of head h at i * H + h."""

    def tokens(self, module: Any, input_shape: tuple[int, ...]) -> Tokens:
        """Of [B, blocks, N, C]."""
        batch, blocks, tokens, _ = input_shape
        return super().tokens(module, (batch * blocks, tokens, 0))

    def spread(self, module: Any, x: Tensor) -> Tensor:
        """A block as an image of its own."""
        return x.flatten(0, 1)

    def columns(self, module: Any) -> ChannelAxis:
        """In the order (d, H)."""
        heads = head_count(module)
        return ChannelAxis("proj.weight", 1, head_step=1, channel_step=heads)

    def output_tap(self, module: Any) -> ActivationHook:
        """Put into the order (H, d)."""
        heads = head_count(module)

        def in_order(_: Any, x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:-1], -1, heads).transpose(-1, -2).flatten(-2)

        return replace(super().output_tap(module), then=in_order)


TOKEN_ATTENTION = (
    FusedAdapter(metaformer.Attention, SlimMetaformerAttention),
    FusedAdapter(convit.MHSA, SlimMhsa),
    FusedAdapter(davit.WindowAttention, SlimDavitWindowAttention),
    FusedAdapter(cait.TalkingHeadAttn, SlimTalkingHeadAttn),
    FusedAdapter(beit.Attention, SlimBeitAttention),
    FusedAdapter(RelPosAttention, SlimRelPosAttention),
    MapAdapter(volo.Attention, SlimVoloAttention),
    MapAdapter(fastvit.Attention, SlimFastvitAttention, channel_dim=1),
    MapAdapter(visformer.Attention, SlimVisformerAttention, channel_dim=1, inner_channel_dim=1),
    LocallyGroupedAdapter(twins.LocallyGroupedAttn, SlimLocallyGroupedAttn),
    NestAdapter(nest.Attention, SlimNestAttention),
)
