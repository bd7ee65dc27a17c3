"""``LambdaLayer`` of LambdaNetworks: queries of every head meet one matrix of keys and values, for all heads.

A q/k channel is a row of that matrix, made of a key that is a softmax over positions and of a convolution of
v, or a table of positions. It meets one channel of every head's queries: they are tied, and count as one
head. Each key has a softmax of its own, so that channels are selected. timm's own forward takes any number of
them. v is not prunable, because no projection reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from timm.layers.lambda_layer import LambdaLayer

from mhacut.adapters.base import ActivationHook, Adapter, ChannelAxis, Layer, Unit
from mhacut.adapters.projection import Projection
from mhacut.adapters.softmax_special import NO_PROJECTION
from mhacut.plan import UnitKind


class LambdaAdapter(Adapter):
    """Rows of ``qkv`` are [q of every head | k | v]."""

    family = "attention"
    module_classes = (LambdaLayer,)

    def describe(self, name: str, module: Any) -> Layer:
        heads, width, qkv = module.num_heads, module.dim_qk, Projection.of(module, "qkv")
        copies = tuple(head * width for head in range(heads))
        query, *query_bias = (replace(axis, copies=copies) for axis in qkv.rows())
        query = replace(query, norm="norm_q")
        if module.conv_lambda is None:
            positions = [ChannelAxis("pos_emb", 2)]
        else:
            positions = [ChannelAxis(f"conv_lambda.{part}", 0) for part in ("weight", "bias")]
        qk = Unit(
            name,
            "qk",
            1,
            width,
            axes=(query, *query_bias, *qkv.rows(heads * width), *positions),
            scale_axes=(query,),
            hooks={
                # Each head is an observation: (B, height, width, H, d).
                "query": ActivationHook(
                    "norm_q", "output", then=lambda _, x: x.movedim(1, -1).unflatten(-1, (heads, -1))
                ),
                "key": replace(
                    qkv.hook("output", heads * width),
                    then=lambda _, x: x.flatten(2).softmax(dim=-1).view_as(x),
                ),
            },
            mixing="select",
        )
        return Layer(name, self, (qk,), {"v": NO_PROJECTION}, channel_dim=1)

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        module.dim_qk = widths["qk"]
        if module.conv_lambda is not None:
            module.conv_lambda.out_channels = widths["qk"]
