"""CoaT's factorised attention: q (softmax(k)^T v), and q times a depthwise convolution of v.

Channel i of q multiplies row i of softmax(k)^T v, and the convolved channel i of v; so q, k and v keep the
same channels. That row is added to all channels of the head: without channel i, more changes than the column
of the projection that reads it. Layers of a stage share the convolutions; a layer that is cut gets its own,
with the channels that it kept.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from timm.models.coat import CoaT, FactorAttnConvRelPosEnc
from torch import Tensor, nn

from mhacut.adapters.base import Adapter, ChannelAxis, Layer, Unit
from mhacut.adapters.projection import Projection
from mhacut.adapters.shapes import by_head, merged
from mhacut.plan import UnitKind


class SlimFactorAttention(FactorAttnConvRelPosEnc):  # type: ignore[misc]
    """CoaT's attention, at any width. Made by ``resize``, never constructed."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, 1 + H * W, C] to the same, with ``size`` (H, W)."""
        q, k, v = (by_head(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))  # (B, H, N, d)
        gathered = q @ (k.softmax(dim=2).mT @ v)
        return self.proj_drop(self.proj(merged(self.scale * gathered + self.crpe(q, v, size=size))))


class FactorAttentionAdapter(Adapter):
    """Rows of ``qkv`` are [q | k | v], each head-major; each convolution has the v of several heads."""

    family = "attention"
    module_classes = (FactorAttnConvRelPosEnc, SlimFactorAttention)

    def describe(self, name: str, module: Any) -> Layer:
        qkv, proj, heads = Projection.of(module, "qkv"), Projection.of(module, "proj"), module.num_heads
        query, key, value = (qkv.rows(offset) for offset in (0, proj.reads, 2 * proj.reads))
        written, hooks = (
            query + key + value + _convolutions(module),
            {"value": qkv.hook("output", 2 * proj.reads)},
        )
        unit = proj.unit(name, "v", (heads, proj.reads // heads), written, hooks, feeds=True)
        unit = replace(unit, scale_axes=(*query, *unit.scale_axes))
        return Layer(name, self, (unit,), coupled_with={"qk": "v"})

    def keep(self, module: Any, unit: Unit, kept: Tensor) -> None:
        if kept.shape[1] < unit.width:
            module.crpe = copy.deepcopy(module.crpe)

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        module.__class__ = SlimFactorAttention
        module.crpe.channel_splits = [split * widths["v"] for split in module.crpe.head_splits]

    def settle(self, model: nn.Module) -> None:
        """Let the model refer to the convolutions of the first layer of those that shared them."""
        coats: list[Any] = [module for module in model.modules() if isinstance(module, CoaT)]
        for coat in coats:
            for stage in range(1, 5):
                layers = [block.factoratt_crpe for block in getattr(coat, f"serial_blocks{stage}") or ()]
                if stage > 1:
                    parallel = coat.parallel_blocks or ()
                    layers += [getattr(block, f"factoratt_crpe{stage}") for block in parallel]
                if layers:
                    setattr(coat, f"crpe{stage}", layers[0].crpe)


def _convolutions(module: Any) -> tuple[ChannelAxis, ...]:
    """Axes of the channels of v in the convolutions."""
    axes: list[ChannelAxis] = []
    first = 0
    for number, split in enumerate(module.crpe.head_splits):
        own = Projection.of(module, f"crpe.conv_list.{number}").rows()
        axes += [replace(axis, heads=(first, first + split)) for axis in own]
        first += split
    return tuple(axes)
