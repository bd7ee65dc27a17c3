"""Softmax attention wherever its q, k and v lie: what is alike in all classes of it.

An adapter says in which rows of which projections a class keeps them and how many tokens it sees. A slim
class says only how its input becomes heads, where timm's own forward has the dense widths built in.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mhacut.adapters.attend import attend
from mhacut.adapters.base import ActivationHook, Adapter, ChannelAxis, Layer, Unit
from mhacut.adapters.rows import Projection
from mhacut.plan import UnitKind


@dataclass(frozen=True)
class Rows:
    """Rows of a projection: channel i of head h is row ``offset + h * stride + i``."""

    projection: str
    offset: int = 0
    stride: int | None = None
    """The width of a head if None."""


@dataclass(frozen=True)
class Layout:
    """Where a layer keeps its q, k and v."""

    heads: int
    qk_width: int
    v_width: int
    query: Rows
    key: Rows
    value: Rows
    output_projection: str = "proj"
    """The projection that reads what attention gives, or any of its kind where v is left whole."""
    beside_value: tuple[Rows, ...] = ()
    """Rows that channels of v need too."""
    v_rotatable: bool = True
    """Nothing acts on single channels of v."""
    v_left_whole: str | None = None
    """Why channels of v must stay, if they must."""


def per_head(projection: str, qk_width: int, v_width: int) -> tuple[Rows, Rows, Rows]:
    """q, k and v of one projection whose rows are q, k, v within every head."""
    stride = 2 * qk_width + v_width
    return (
        Rows(projection, 0, stride),
        Rows(projection, qk_width, stride),
        Rows(projection, 2 * qk_width, stride),
    )


class SoftmaxAdapter(Adapter):
    """softmax(q k^T / sqrt(qk_width)) v, then a projection."""

    family = "attention"

    @abstractmethod
    def layout(self, module: Any) -> Layout:
        """Where q, k and v lie in ``module`` now."""

    def v_width(self, module: Any) -> int:
        """Channels of v per head in ``module``, where they were left whole."""
        return self.layout(module).v_width

    def tokens(self, module: Any, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Attentions computed for one image, queries in each, keys in each."""
        batch, tokens, _ = input_shape
        return batch, tokens, tokens

    def retell(self, module: Any, qk_width: int, v_width: int) -> None:
        """Tell ``module`` of new widths, its class included; ``scale`` was set already."""

    def describe(self, name: str, module: Any) -> Layer:
        layout = self.layout(module)
        query, key, value = (
            Projection.of(module, part.projection) for part in (layout.query, layout.key, layout.value)
        )
        output_projection = Projection.of(module, layout.output_projection)
        qk = Unit(
            name,
            "qk",
            layout.heads,
            layout.qk_width,
            axes=_axes(query, layout.query) + _axes(key, layout.key),
            scale_axes=query.scaled_rows(layout.query.offset, layout.query.stride),
            hooks={"query": _tap(query, layout.query), "key": _tap(key, layout.key)},
            mixing="rotate",
            softmax_scaled=True,
        )
        if layout.v_left_whole is not None:
            return Layer(name, self, (qk,), {"v": layout.v_left_whole}, output_projection.channel_dim)
        beside = [_axes(Projection.of(module, rows.projection), rows) for rows in layout.beside_value]
        v = Unit(
            name,
            "v",
            layout.heads,
            layout.v_width,
            axes=(
                *_axes(value, layout.value),
                *(axis for axes in beside for axis in axes),
                output_projection.columns(),
            ),
            scale_axes=(output_projection.columns(),),
            hooks={"value": _tap(value, layout.value), "output": output_projection.hook("input")},
            output_projection=output_projection.columns(),
            output_bias=output_projection.constant_bias,
            output_norm=output_projection.norm,
            mixing="rotate" if layout.v_rotatable else "refit",
        )
        return Layer(name, self, (qk, v), channel_dim=output_projection.channel_dim)

    def flops(self, module: Any, input_shape: tuple[int, ...], widths: Mapping[UnitKind, Any]) -> Any:
        layout = self.layout(module)
        attentions, queries, keys = self.tokens(module, input_shape)

        query, key = (
            Projection.of(module, part.projection).flops_per_row for part in (layout.query, layout.key)
        )
        total: Any = 0
        if "qk" in widths:
            total += widths["qk"] * (query * queries + key * keys + queries * keys)
        if "v" in widths:
            total += widths["v"] * self.flops_of_v(module, input_shape)
        return attentions * layout.heads * total

    def flops_of_v(self, module: Any, input_shape: tuple[int, ...]) -> int:
        """Of one channel of v in one attention."""
        layout, (_, queries, keys) = self.layout(module), self.tokens(module, input_shape)
        values = (layout.value, *layout.beside_value)
        writes = sum(Projection.of(module, part.projection).flops_per_row for part in values)
        reads = Projection.of(module, layout.output_projection).flops_per_column
        return writes * keys + queries * keys + reads * queries

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> nn.Module:
        qk_width = widths.get("qk", self.layout(module).qk_width)
        module.scale = qk_width**-0.5
        self.retell(module, qk_width, widths.get("v", self.v_width(module)))
        slim: nn.Module = module
        return slim


def _axes(projection: Projection, rows: Rows) -> tuple[ChannelAxis, ...]:
    return projection.rows(rows.offset, rows.stride)


def _tap(projection: Projection, rows: Rows) -> ActivationHook:
    return projection.hook("output", rows.offset, rows.stride)


def heads_of(x: Tensor, heads: int) -> Tensor:
    """[B, N, H * d] -> [B, H, N, d]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def split_heads(qkv: Any, heads: int, v_dim: int, *, head_first: bool) -> tuple[Tensor, ...]:
    """q, k and v, each [B, H, N, d], of a projection's rows [B, N, H * (2 d_qk + d_v)].

    Args:
        qkv: of all heads.
        heads: how many.
        v_dim: channels of v in all of them.
        head_first: rows are q, k, v within every head, not over all heads.
    """
    qk_dim = (qkv.shape[-1] - v_dim) // 2
    if head_first:
        sizes = [qk_dim // heads, qk_dim // heads, v_dim // heads]
        return torch.split(heads_of(qkv, heads), sizes, dim=-1)
    return tuple(heads_of(part, heads) for part in torch.split(qkv, [qk_dim, qk_dim, v_dim], dim=-1))


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, N, d] -> [B, N, H * d]."""
    return x.transpose(1, 2).flatten(2)


def as_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H * W, C]."""
    return x.flatten(2).transpose(1, 2)


def as_map(x: Tensor, size: Sequence[int]) -> Tensor:
    """[B, H * W, C] -> [B, C, H, W]; ``size`` is the height and width."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *size)


def attend_in(module: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`attend` as ``module`` has it set; the heads side by side, [B, N, H * d_v]."""
    dropout = module.attn_drop.p if module.training and hasattr(module, "attn_drop") else 0.0
    fused = getattr(module, "fused_attn", False)
    return merge_heads(attend(q, k, v, scale=module.scale, fused=fused, attn_mask=bias, dropout_p=dropout))
