"""Attention inside of ResNets: ``BottleneckAttn`` and ``HaloAttn``, whose positions weigh q channels.

Heads share the table of positions, of which a q channel reads a column: the heads keep the same channels, and
count as one. A q mixed for k would not fit the table, so that channels are chosen. The scale stays that of
the dense layer, since the bias of positions need not be scaled. timm's own forward computes at any width of
q/k. There is no projection behind v, which stays whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn

from mhacut.adapters.base import ActivationHook, Adapter, ChannelAxis, Layer, Unit
from mhacut.adapters.rows import Projection
from mhacut.plan import UnitKind

NO_PROJECTION = "no projection of the layer reads it"
_TABLES = ("pos_embed.height_rel", "pos_embed.width_rel")


@dataclass(frozen=True)
class _Rows:
    """Channel i of head h is row ``offset + h * stride + i``."""

    projection: str
    offset: int
    stride: int


class PositionalAdapter(Adapter):
    """What both classes share."""

    family = "attention"

    def query(self, module: Any) -> _Rows:
        """Where q lies."""
        raise NotImplementedError

    def key(self, module: Any) -> _Rows:
        """Where k lies."""
        raise NotImplementedError

    def describe(self, name: str, module: Any) -> Layer:
        query, key = (self._axes(module, rows) for rows in (self.query(module), self.key(module)))
        qk = Unit(
            name,
            "qk",
            1,
            module.dim_head_qk,
            axes=(*query, *key, *(ChannelAxis(table, 1) for table in _TABLES)),
            scale_axes=query,
            hooks={
                "query": self._tap(module, self.query(module)),
                "key": self._tap(module, self.key(module)),
            },
            mixing="select",
        )
        return Layer(name, self, (qk,), {"v": NO_PROJECTION}, channel_dim=1)

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> nn.Module:
        module.dim_head_qk = module.pos_embed.dim_head = widths["qk"]
        module.dim_out_qk = widths["qk"] * module.num_heads
        slim: nn.Module = module
        return slim

    def _axes(self, module: Any, rows: _Rows) -> tuple[ChannelAxis, ...]:
        projection = Projection.of(module, rows.projection)
        copies = tuple(head * rows.stride for head in range(module.num_heads))
        weight = ChannelAxis(f"{rows.projection}.weight", 0, rows.offset, copies=copies)
        if projection.bias is None:
            return (weight,)
        return weight, ChannelAxis(projection.bias, 0, rows.offset, copies=copies)

    def _tap(self, module: Any, rows: _Rows) -> ActivationHook:
        heads, width = module.num_heads, module.dim_head_qk
        return ActivationHook(rows.projection, "output", then=partial(_every_head, rows, heads, width))


def _every_head(rows: _Rows, heads: int, width: int, module: Any, x: Tensor) -> Tensor:
    """[B, channels, H, W], each head an observation of its own: [B, H, W, heads, d]."""
    return x[:, rows.offset :].movedim(1, -1).unfold(-1, width, rows.stride)[..., :heads, :]


class BottleneckAdapter(PositionalAdapter):
    """Rows of ``qkv`` are [q | k | v], each head-major."""

    module_classes = (BottleneckAttn,)

    def query(self, module: Any) -> _Rows:
        return _Rows("qkv", 0, module.dim_head_qk)

    def key(self, module: Any) -> _Rows:
        return _Rows("qkv", module.dim_out_qk, module.dim_head_qk)


class HaloAdapter(PositionalAdapter):
    """``q``, and ``kv`` with rows k, v within every head; a block of queries sees its halo too."""

    module_classes = (HaloAttn,)

    def query(self, module: Any) -> _Rows:
        return _Rows("q", 0, module.dim_head_qk)

    def key(self, module: Any) -> _Rows:
        return _Rows("kv", 0, module.dim_head_qk + module.dim_head_v)


POSITIONAL_ATTENTION = (BottleneckAdapter(), HaloAdapter())
