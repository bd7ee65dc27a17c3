"""``LambdaLayer`` of LambdaNetworks: queries of every head meet one matrix of keys and values, for all heads.

A q/k channel is a row of that matrix, made of a key that is a softmax over positions and of a convolution of
v, or a table of positions. It meets one channel of every head's queries: they go together, and count as one
head. Each key has a softmax of its own, so that channels are chosen. timm's own forward computes at any
number of them. There is no projection behind v, which stays whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.layers.lambda_layer import LambdaLayer
from torch import Tensor, nn

from mhacut.adapters.base import ActivationHook, Adapter, ChannelAxis, Layer, Unit
from mhacut.adapters.bottleneck_attention import NO_PROJECTION
from mhacut.adapters.softmax_special import as_observations
from mhacut.plan import UnitKind


class LambdaAdapter(Adapter):
    """Rows of ``qkv`` are [q of every head | k | v]."""

    family = "attention"
    module_classes = (LambdaLayer,)

    def describe(self, name: str, module: Any) -> Layer:
        heads, width = module.num_heads, module.dim_qk
        copies = tuple(head * width for head in range(heads))
        query = ChannelAxis("qkv.weight", 0, copies=copies, norm="norm_q")
        axes = [query, ChannelAxis("qkv.weight", 0, heads * width)]
        if module.qkv.bias is not None:
            axes += [ChannelAxis("qkv.bias", 0, copies=copies), ChannelAxis("qkv.bias", 0, heads * width)]
        if module.conv_lambda is None:
            axes.append(ChannelAxis("pos_emb", 2))
        else:
            axes += [ChannelAxis(f"conv_lambda.{part}", 0) for part in ("weight", "bias")]
        qk = Unit(
            name,
            "qk",
            1,
            width,
            axes=tuple(axes),
            scale_axes=(query,),
            hooks={
                "query": ActivationHook("norm_q", "output", then=partial(as_observations, heads)),
                "key": ActivationHook("qkv", "output", heads * width, channel_dim=1, then=_over_positions),
            },
            mixing="select",
        )
        return Layer(name, self, (qk,), {"v": NO_PROJECTION}, channel_dim=1)

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> nn.Module:
        module.dim_qk = widths["qk"]
        if module.conv_lambda is not None:
            module.conv_lambda.out_channels = widths["qk"]
        slim: nn.Module = module
        return slim


def _over_positions(module: Any, x: Tensor) -> Tensor:
    """[B, channels, H, W], each channel's sum 1."""
    return x.flatten(2).softmax(dim=-1).view_as(x)


LAMBDA_ATTENTION = (LambdaAdapter(),)
