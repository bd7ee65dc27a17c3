"""MLPs of timm, each behind one attention."""

from __future__ import annotations

from collections.abc import Callable

from timm.layers import LayerNorm2d
from timm.layers.mlp import ConvMlp, GluMlp, Mlp, SwiGLU
from timm.models import (
    efficientformer,
    efficientformer_v2,
    efficientvit_msra,
    fastvit,
    gemma4_vit,
    iformer,
    levit,
    pvt_v2,
    shvit,
    swiftformer,
    tiny_vit,
    visformer,
    vitamin,
)
from torch import nn

from helpers.models import LayerCase
from properties.cases.parts import clip


def on_tokens(make: Callable[[], nn.Module], args: tuple = ()) -> LayerCase:
    return LayerCase(make, mlp=True, args=args)


def on_map(make: Callable[[], nn.Module], whole: str = "") -> LayerCase:
    return LayerCase(make, tokens=False, mlp=True, whole={"hidden": whole} if whole else {})


CASES: dict[type[nn.Module], dict[str, LayerCase]] = {
    Mlp: {"": on_tokens(lambda: Mlp(12, 20))},
    GluMlp: {"": on_tokens(lambda: GluMlp(12, 20))},
    SwiGLU: {"": on_tokens(lambda: SwiGLU(12, 20))},
    ConvMlp: {
        "": on_map(lambda: ConvMlp(12, 20)),
        "batch norm": on_map(lambda: ConvMlp(12, 20, norm_layer=nn.BatchNorm2d, bias=False)),
        "layer norm": on_map(
            lambda: ConvMlp(12, 20, norm_layer=LayerNorm2d), "a norm runs over all hidden channels"
        ),
    },
    pvt_v2.MlpWithDepthwiseConv: {
        "": on_tokens(lambda: pvt_v2.MlpWithDepthwiseConv(12, 20), ((4, 4),)),
        "relu": on_tokens(lambda: pvt_v2.MlpWithDepthwiseConv(12, 20, extra_relu=True), ((4, 4),)),
    },
    levit.LevitMlp: {
        "": on_tokens(lambda: levit.LevitMlp(12, 20)),
        "convolutions": on_map(lambda: levit.LevitMlp(12, 20, use_conv=True)),
    },
    vitamin.GeGluMlp: {"": on_tokens(lambda: vitamin.GeGluMlp(12, 20))},
    fastvit.ConvMlp: {"": on_map(lambda: fastvit.ConvMlp(12, 20))},
    tiny_vit.NormMlp: {"": on_tokens(lambda: tiny_vit.NormMlp(12, 20))},
    swiftformer.Mlp: {"": on_map(lambda: swiftformer.Mlp(12, 20))},
    efficientformer.ConvMlpWithNorm: {
        "": on_map(lambda: efficientformer.ConvMlpWithNorm(12, 20)),
        "no norm": on_map(lambda: efficientformer.ConvMlpWithNorm(12, 20, norm_layer=None)),
    },
    efficientformer_v2.ConvMlpWithNorm: {
        "": on_map(lambda: efficientformer_v2.ConvMlpWithNorm(12, 20)),
        "depthwise": on_map(
            lambda: efficientformer_v2.ConvMlpWithNorm(12, 20, mid_conv=True, act_layer=nn.GELU)
        ),
    },
    efficientvit_msra.ConvMlp: {"": on_map(lambda: efficientvit_msra.ConvMlp(12, 20))},
    shvit.FFN: {"": on_map(lambda: shvit.FFN(12, 20))},
    iformer.FFN: {
        "": on_map(lambda: iformer.FFN(12, 2)),
        "scaled": on_map(lambda: iformer.FFN(12, 2, layer_scale_init_value=0.5)),
    },
    visformer.SpatialMlp: {
        "": on_map(lambda: visformer.SpatialMlp(12, 20)),
        "in groups": LayerCase(
            lambda: visformer.SpatialMlp(16, 20, spatial_conv=True, group=8),
            dim=16,
            tokens=False,
            mlp=True,
            whole={"hidden": "a convolution mixes hidden channels"},
        ),
    },
    gemma4_vit.Gemma4GatedMlp: {
        "": on_tokens(lambda: gemma4_vit.Gemma4GatedMlp(12, 20)),
        "clipped": on_tokens(lambda: clip(gemma4_vit.Gemma4GatedMlp(12, 20, use_clipped_linears=True))),
    },
}
