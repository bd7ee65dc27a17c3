"""``MultiQueryAttention2d`` of MobileNetV4: queries of every head, one head of keys and values for all.

Channel i of the keys meets channel i of every head's queries: they go together, and count as one head. timm's
own forward computes at any widths. v is left whole: one channel of it leaves by a column for each head.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.layers import MultiQueryAttention2d
from torch import Tensor, nn

from mhacut.adapters.base import Adapter, ChannelAxis, Layer, Tap, Unit
from mhacut.adapters.rope_attention import SHARED_KEYS
from mhacut.plan import UnitKind


class MultiQueryAdapter(Adapter):
    """``query.proj`` has rows of every head, ``key.proj`` of one; all are convolutions."""

    family = "attention"
    module_classes = (MultiQueryAttention2d,)

    def describe(self, name: str, module: Any) -> Layer:
        heads, width = module.num_heads, module.key_dim
        copies = tuple(head * width for head in range(heads))
        query = _axes(module.query, "query", copies)
        qk = Unit(
            name,
            "qk",
            1,
            width,
            axes=(*query, *_axes(module.key, "key", (0,))),
            gain_axes=query,
            taps={
                "query": Tap("query.proj", "output", then=partial(every_head, heads)),
                "key": Tap("key.proj", "output", channel_dim=1),
            },
            rotatable=True,
            softmax_scaled=True,
        )
        return Layer(name, self, (qk,), {"v": SHARED_KEYS}, channel_dim=1)

    def flops(self, module: Any, input_shape: tuple[int, ...], widths: Mapping[UnitKind, Any]) -> Any:
        batch, dim, height, width = input_shape
        down, across = module.query_strides
        queries = (height // down) * (width // across)
        keys = -(-height // module.kv_stride) * -(-width // module.kv_stride)
        each = module.num_heads * queries * (dim + keys) + dim * keys
        return batch * widths["qk"] * each

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> nn.Module:
        module.key_dim = widths["qk"]
        module.scale = widths["qk"] ** -0.5
        slim: nn.Module = module
        return slim


def _axes(part: Any, name: str, copies: tuple[int, ...]) -> tuple[ChannelAxis, ...]:
    weight = ChannelAxis(f"{name}.proj.weight", 0, copies=copies)
    return (
        (weight,) if part.proj.bias is None else (weight, ChannelAxis(f"{name}.proj.bias", 0, copies=copies))
    )


def every_head(heads: int, module: Any, x: Tensor) -> Tensor:
    """[B, heads * d, H, W], each head an observation of its own: [B, H, W, heads, d]."""
    x = x.movedim(1, -1)
    return x.reshape(*x.shape[:-1], heads, -1)


MULTI_QUERY_ATTENTION = (MultiQueryAdapter(),)
