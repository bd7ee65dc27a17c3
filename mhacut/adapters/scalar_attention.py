"""MobileViTv2's attention: one score per point, and a sum of keys weighed by it that scales every value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models.mobilevit import LinearSelfAttention
from torch import nn

from mhacut.adapters.base import Adapter, Layer, Unit
from mhacut.adapters.rows import Projection
from mhacut.plan import UnitKind


class ScalarAttentionAdapter(Adapter):
    """``qkv_proj`` with rows [score | k | v]. Channel i of k, of v and of the result are one, called v."""

    family = "attention"
    module_classes = (LinearSelfAttention,)

    def describe(self, name: str, module: Any) -> Layer:
        qkv, proj, width = (
            Projection.of(module, "qkv_proj"),
            Projection.of(module, "out_proj"),
            module.embed_dim,
        )
        v = Unit(
            name,
            "v",
            1,
            width,
            axes=(*qkv.rows(1), *qkv.rows(1 + width), proj.columns()),
            scale_axes=(proj.columns(),),
            hooks={"value": qkv.hook("output", 1 + width), "output": proj.hook("input")},
            output_projection=proj.columns(),
            output_bias=proj.bias,
        )
        return Layer(name, self, (v,), channel_dim=1)

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> nn.Module:
        module.embed_dim = widths["v"]
        slim: nn.Module = module
        return slim
