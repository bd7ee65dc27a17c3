"""``MultiQueryAttention2d`` of MobileNetV4: queries of every head, one head of keys and values for all.

Channel i of the keys meets channel i of every head's queries: they go together, and count as one head. What
every head makes of channel i of the values is read by a column of its own: heads keep the same channels, and
columns are refitted on those of all heads. timm's own forward computes at any widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from timm.layers import MultiQueryAttention2d
from torch import Tensor, nn

from mhacut.adapters.base import ActivationHook, Adapter, ChannelAxis, Layer, Unit
from mhacut.adapters.rows import rows
from mhacut.plan import UnitKind

BILINEAR_FLOPS = 4
"""Per pixel of a map made larger, as fvcore counts them."""


class MultiQueryAdapter(Adapter):
    """``query.proj`` has rows of every head, ``key.proj`` of one; all are convolutions."""

    family = "attention"
    module_classes = (MultiQueryAttention2d,)

    def describe(self, name: str, module: Any) -> Layer:
        heads, width = module.num_heads, module.key_dim
        copies = tuple(head * width for head in range(heads))
        query, key, value = (rows(module, f"{part}.proj") for part in ("query", "key", "value"))
        query = tuple(replace(axis, copies=copies) for axis in query)
        qk = Unit(
            name,
            "qk",
            1,
            width,
            axes=query + key,
            scale_axes=query,
            hooks={
                "query": ActivationHook("query.proj", "output", then=partial(every_head, heads)),
                "key": ActivationHook("key.proj", "output", channel_dim=1),
            },
            mixing="rotate",
            softmax_scaled=True,
        )
        columns = ChannelAxis("output.proj.weight", 1)
        v = Unit(
            name,
            "v",
            heads,
            module.value_dim,
            axes=(*(replace(axis, shared=True) for axis in value), columns),
            scale_axes=(columns,),
            hooks={
                "value": ActivationHook(
                    "value.proj", "output", channel_dim=1, then=partial(_to_every_head, heads)
                ),
                "output": ActivationHook("output.proj", "input", channel_dim=1),
            },
            output_projection=columns,
            output_bias=None if module.output.proj.bias is None else "output.proj.bias",
            mixing="rotate",
            sharing="tied",
        )
        return Layer(name, self, (qk, v), channel_dim=1)

    def flops(self, module: Any, input_shape: tuple[int, ...], widths: Mapping[UnitKind, Any]) -> Any:
        batch, dim, height, width = input_shape
        down, across = module.query_strides
        queries = (height // down) * (width // across)
        keys = -(-height // module.kv_stride) * -(-width // module.kv_stride)
        total = widths["qk"] * (module.num_heads * queries * (dim + keys) + dim * keys)
        reads = module.output.proj.out_channels + BILINEAR_FLOPS * module.has_query_strides
        total += widths["v"] * (module.num_heads * (queries * keys + height * width * reads) + dim * keys)
        return batch * total

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> nn.Module:
        module.key_dim, module.value_dim = widths["qk"], widths["v"]
        module.scale = widths["qk"] ** -0.5
        slim: nn.Module = module
        return slim


def every_head(heads: int, module: Any, x: Tensor) -> Tensor:
    """[B, heads * d, H, W], each head an observation of its own: [B, H, W, heads, d]."""
    x = x.movedim(1, -1)
    return x.reshape(*x.shape[:-1], heads, -1)


def _to_every_head(heads: int, module: Any, x: Tensor) -> Tensor:
    """[B, d, H, W] as every head has it, [B, heads * d, H, W]."""
    return x.repeat(1, heads, 1, 1)


MULTI_QUERY_ATTENTION = (MultiQueryAdapter(),)
