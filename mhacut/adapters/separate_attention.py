"""Softmax attention with projections of their own for q, for k and v, or for both and v.

The class attention of CaiT, XCiT and VOLO, CrossViT's, Next-ViT's, Twins' global one, ConViT's and TNT's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models import cait, convit, crossvit, nextvit, tnt, twins, volo
from torch import Tensor

from mhacut.adapters.rows import Projection
from mhacut.adapters.softmax import Layout, Rows, SoftmaxAdapter, as_map, as_tokens, attend_in, heads_of


class _Separate:
    """A forward for any widths. Mixed into timm's classes by ``resize``, never constructed."""

    names: tuple[str, ...] = ("q", "k", "v")

    def sources(self, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """What queries and what keys and values are made of."""
        return x, x

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """[B, N, C] to [B, queries, C_out]."""
        module: Any = self
        query_from, key_from = self.sources(x, *args)
        query, *rest = (getattr(module, name) for name in self.names)
        if len(rest) == 2:
            k, v = (projection(key_from) for projection in rest)
        else:
            v_dim = module.proj.in_features
            k, v = rest[0](key_from).split((rest[0].out_features - v_dim, v_dim), dim=-1)
        q, k, v = (heads_of(part, module.num_heads) for part in (query(query_from), k, v))
        projected: Tensor = module.proj_drop(module.proj(attend_in(module, q, k, v)))
        return projected


class _OfClassToken(_Separate):
    def sources(self, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        return x[:, :1], x


class SlimClassAttn(_OfClassToken, cait.ClassAttn):  # type: ignore[misc]
    """CaiT's, at any widths."""


class SlimCrossAttention(_OfClassToken, crossvit.CrossAttention):  # type: ignore[misc]
    """CrossViT's, at any widths."""

    names = ("wq", "wk", "wv")


class SlimVoloClassAttention(_OfClassToken, volo.ClassAttention):  # type: ignore[misc]
    """VOLO's, at any widths."""

    names = ("q", "kv")


class SlimNextVitAttention(_Separate, nextvit.EfficientAttention):  # type: ignore[misc]
    """Next-ViT's, at any widths."""

    def sources(self, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        if self.sr is None:
            return x, x
        return x, self.norm(self.sr(x.transpose(1, 2))).transpose(1, 2)


class SlimGlobalSubSampleAttn(_Separate, twins.GlobalSubSampleAttn):  # type: ignore[misc]
    """Twins', at any widths."""

    names = ("q", "kv")

    def sources(self, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        if self.sr is None:
            return x, x
        return x, self.norm(as_tokens(self.sr(as_map(x, args[0]))))


class SeparateAdapter(SoftmaxAdapter):
    """A projection each for q, k and v, or for q and for [k | v]; each head-major."""

    def __init__(self, dense: type[Any], slim: type[Any], *, one_query: bool = False) -> None:
        """Serve ``dense``, as ``slim`` once cut; ``one_query`` is the class token's."""
        self.module_classes = (dense, slim)
        self.slim, self.one_query = slim, one_query

    def layout(self, module: Any) -> Layout:
        query, *rest = self.slim.names
        qk_dim = Projection.of(module, query).writes
        key, value = Rows(rest[0]), Rows(rest[1]) if len(rest) == 2 else Rows(rest[0], qk_dim)
        heads = module.num_heads
        return Layout(heads, qk_dim // heads, module.proj.in_features // heads, Rows(query), key, value)

    def tokens(self, module: Any, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
        batch, tokens, _ = input_shape
        return batch, 1 if self.one_query else tokens, self.keys(module, tokens)

    def keys(self, module: Any, tokens: int) -> int:
        """How many keys so many tokens become."""
        return tokens

    def retell(self, module: Any, qk_width: int, v_width: int) -> None:
        module.__class__ = self.slim


class NextVitAdapter(SeparateAdapter):
    def keys(self, module: Any, tokens: int) -> int:
        return tokens if module.sr is None else tokens // int(module.N_ratio)


class GlobalSubSampleAdapter(SeparateAdapter):
    def keys(self, module: Any, tokens: int) -> int:
        # Of maps that are not square, only if sides divide evenly.
        if module.sr is None:
            return tokens
        side, ratio = math.isqrt(tokens), int(module.sr_ratio)
        return (side // ratio) ** 2 if side * side == tokens else tokens // ratio**2


class _QkAdapter(SoftmaxAdapter):
    """One projection with rows [q | k], one for v."""

    def layout(self, module: Any) -> Layout:
        qk_dim, heads = module.qk.out_features // 2, module.num_heads
        v_width = module.proj.in_features // heads
        return Layout(heads, qk_dim // heads, v_width, Rows("qk"), Rows("qk", qk_dim), Rows("v"))


class TntAdapter(_QkAdapter):
    """TNT's own forward takes any widths."""

    module_classes = (tnt.Attention,)

    def retell(self, module: Any, qk_width: int, v_width: int) -> None:
        module.head_dim, module.hidden_dim = qk_width, qk_width * module.num_heads


class SlimGpsa(convit.GPSA):  # type: ignore[misc]
    """ConViT's gated positional attention, at any widths. Made by ``resize``, never constructed."""

    rel_indices: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] to [B, N, C_out]."""
        if self.rel_indices.shape[1] != x.shape[1]:
            self.rel_indices = self.get_rel_indices(x.shape[1])
        v = heads_of(self.v(x), self.num_heads)
        mixed = (self.get_attention(x) @ v).transpose(1, 2).flatten(2)
        projected: Tensor = self.proj_drop(self.proj(mixed))
        return projected

    def get_attention(self, x: Tensor) -> Tensor:
        """[B, H, N, N], of what tokens say and of where they are, in a share that each head has learnt."""
        q, k = (heads_of(part, self.num_heads) for part in self.qk(x).chunk(2, dim=-1))
        content = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        place = self.pos_proj(self.rel_indices).permute(0, 3, 1, 2).softmax(dim=-1)
        share = torch.sigmoid(self.gating_param).view(1, -1, 1, 1)
        mixed = (1.0 - share) * content + share * place
        weights: Tensor = self.attn_drop(mixed / mixed.sum(dim=-1, keepdim=True))
        return weights


class GpsaAdapter(_QkAdapter):
    module_classes = (convit.GPSA, SlimGpsa)

    def retell(self, module: Any, qk_width: int, v_width: int) -> None:
        module.__class__ = SlimGpsa


SEPARATE = (
    SeparateAdapter(cait.ClassAttn, SlimClassAttn, one_query=True),
    SeparateAdapter(crossvit.CrossAttention, SlimCrossAttention, one_query=True),
    SeparateAdapter(volo.ClassAttention, SlimVoloClassAttention, one_query=True),
    NextVitAdapter(nextvit.EfficientAttention, SlimNextVitAttention),
    GlobalSubSampleAdapter(twins.GlobalSubSampleAttn, SlimGlobalSubSampleAttn),
    TntAdapter(),
    GpsaAdapter(),
)
