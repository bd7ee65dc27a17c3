"""Attention without a matrix of weights: SwiftFormer's and MobileViTv2's. timm's own forwards take any width.

SwiftFormer multiplies every key by the weighted sum of all queries. Channel i of the sum meets channel i of
the keys; output i of a projection of the products is added to channel i of the queries, and read. So channel
i of queries, keys and projection are cut together, as qk; there is no v. Queries and keys have unit length
over all channels. So a channel is removed exactly if it is zero in both and not read either, because the
projection writes to it what it reads from others.

MobileViTv2 weighs keys by one score per point and multiplies every value by their sum. Channel i of k, of v
and of the result are cut together, as v.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from timm.models.mobilevit import LinearSelfAttention
from timm.models.swiftformer import EfficientAdditiveAttention

from mhacut.adapters.base import ActivationHook, Adapter, ChannelAxis, Layer, Unit
from mhacut.adapters.projection import Projection
from mhacut.plan import UnitKind


class AdditiveAdapter(Adapter):
    """Adapter of SwiftFormer's attention."""

    family = "attention"
    module_classes = (EfficientAdditiveAttention,)

    def heads(self, module: Any) -> int:
        """Return 1: its heads do not differ."""
        return 1

    def describe(self, name: str, module: Any) -> Layer:
        names = ("to_query", "to_key", "proj", "final")
        query, key, proj, final = (Projection.of(module, part) for part in names)
        scaled = (*query.rows(), *key.rows(), final.columns())
        qk = Unit(
            name,
            "qk",
            1,
            query.writes,
            axes=(*scaled, ChannelAxis("w_g", 0), *proj.rows(), proj.columns()),
            scale_axes=scaled,
            hooks={
                side: ActivationHook(f"to_{side}", "output", then=lambda _, x: F.normalize(x, dim=-1))
                for side in ("query", "key")
            },
            mixing="select",
        )
        return Layer(name, self, (qk,), channel_dim=1)


class SeparableAdapter(Adapter):
    """Adapter of MobileViTv2's attention: rows of ``qkv_proj`` are [score | k | v]."""

    family = "attention"
    module_classes = (LinearSelfAttention,)

    def describe(self, name: str, module: Any) -> Layer:
        qkv, proj = Projection.of(module, "qkv_proj"), Projection.of(module, "out_proj")
        written, value = (*qkv.rows(1), *qkv.rows(1 + proj.reads)), qkv.hook("output", 1 + proj.reads)
        v = proj.unit(name, "v", (1, proj.reads), written, {"value": value})
        return Layer(name, self, (v,), channel_dim=1)

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        module.embed_dim = widths["v"]
