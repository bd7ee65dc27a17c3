"""CoaT's factorised attention: q (softmax(k)^T v), and q times a depthwise convolution of v.

Channel i of q reads what channel i of k gathered and weighs the convolved channel i of v, which leaves as
channel i; so q, k and v keep the same channels. What a channel gathered reaches all others of its head: with
it goes more than what the projection reads. Layers of a stage share the convolutions; a layer that is cut
gets its own, of the channels that it kept.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from timm.models.coat import CoaT, FactorAttnConvRelPosEnc
from torch import Tensor, nn

from mhacut.adapters.base import ActivationHook, Adapter, ChannelAxis, Layer, Unit
from mhacut.adapters.rows import Projection, rows
from mhacut.plan import UnitKind


class SlimFactorAttention(FactorAttnConvRelPosEnc):  # type: ignore[misc]
    """CoaT's, at any width. Made by ``resize``, never constructed."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, 1 + H * W, C] to the same, with ``size`` (H, W)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, heads, N, d)
        gathered = q @ (k.softmax(dim=2).transpose(-1, -2) @ v)
        attended = self.scale * gathered + self.crpe(q, v, size=size)
        projected: Tensor = self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2)))
        return projected


class FactorAttentionAdapter(Adapter):
    """Rows of ``qkv`` are [q | k | v], each head-major; each convolution has the v of several heads."""

    family = "attention"
    module_classes = (FactorAttnConvRelPosEnc, SlimFactorAttention)

    def describe(self, name: str, module: Any) -> Layer:
        heads, width = module.num_heads, _width(module)
        part, columns = heads * width, ChannelAxis("proj.weight", 1)
        query, key, value = (rows(module, "qkv", offset) for offset in (0, part, 2 * part))
        unit = Unit(
            name,
            "v",
            heads,
            width,
            axes=(*query, *key, *value, *_convolutions(module), columns),
            scale_axes=(*query, columns),
            hooks={
                "value": ActivationHook("qkv", "output", 2 * part),
                "output": ActivationHook("proj", "input"),
            },
            output_projection=columns,
            output_bias="proj.bias",
            feeds=True,
        )
        return Layer(name, self, (unit,), coupled_with={"qk": "v"})

    def keep(self, module: Any, unit: Unit, kept: Tensor) -> None:
        if kept.shape[1] < unit.width:
            module.crpe = copy.deepcopy(module.crpe)

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> nn.Module:
        module.__class__ = SlimFactorAttention
        module.crpe.channel_splits = [split * widths["v"] for split in module.crpe.head_splits]
        slim: nn.Module = module
        return slim

    def settle(self, model: nn.Module) -> None:
        """What layers shared has a name in the model too, which is now for what the first of them has."""
        coats: list[Any] = [module for module in model.modules() if isinstance(module, CoaT)]
        for coat in coats:
            for stage in range(1, 5):
                layers = [block.factoratt_crpe for block in getattr(coat, f"serial_blocks{stage}") or ()]
                if stage > 1:
                    layers += [
                        getattr(block, f"factoratt_crpe{stage}") for block in coat.parallel_blocks or ()
                    ]
                if layers:
                    setattr(coat, f"crpe{stage}", layers[0].crpe)


def _width(module: Any) -> int:
    """Channels of q, k and v in a head."""
    return Projection.of(module, "proj").reads // int(module.num_heads)


def _convolutions(module: Any) -> tuple[ChannelAxis, ...]:
    """Where the convolutions have the channels of v."""
    axes: list[ChannelAxis] = []
    first = 0
    for number, split in enumerate(module.crpe.head_splits):
        own = rows(module, f"crpe.conv_list.{number}")
        axes += [replace(axis, heads=(first, first + split)) for axis in own]
        first += split
    return tuple(axes)


COAT_ATTENTION = (FactorAttentionAdapter(),)
