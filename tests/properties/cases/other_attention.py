"""Attention of timm that is linear, over channels, without q or v of its own, or cannot be cut."""

from __future__ import annotations

from types import MethodType
from typing import Any

from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from timm.layers.lambda_layer import LambdaLayer
from timm.models import (
    coat,
    davit,
    edgenext,
    efficientformer_v2,
    efficientvit_mit,
    efficientvit_msra,
    gemma4_vit,
    iformer,
    mobilevit,
    shvit,
    swiftformer,
    volo,
    xcit,
)
from timm.models.csatv2 import SpatialTransformerBlock
from torch import Tensor, nn

from helpers.models import LayerCase, ModelCase
from properties.cases import parts

Cases = dict[type[nn.Module], dict[str, LayerCase | ModelCase]]
IN_DAVIT = {"whole": parts.SOFTMAX_OVER_CHANNELS, "revived": ("v",)}


class ChannelsLast(nn.Module):
    """A layer of [B, H, W, C] behind an interface of [B, C, H, W]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def in_double(model: nn.Module) -> nn.Module:
    """Let LiteMLA compute in the precision it is given; timm's always takes single precision."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q @ (k.transpose(-1, -2) @ v)
        return out[..., :-1] / (out[..., -1:] + self.eps)

    for module in model.modules():
        if type(module) is efficientvit_mit.LiteMLA:
            module._attn = MethodType(attend, module)
    return model


def multi_scale(*, fast: bool = False, **args: Any) -> LayerCase:
    return LayerCase(
        lambda: in_double(efficientvit_mit.LiteMLA(12, 12, dim=4, **args)), tokens=False, fast=fast
    )


def cascaded(heads: int, *, fast: bool = False, **args: Any) -> LayerCase:
    return LayerCase(
        lambda: efficientvit_msra.CascadedGroupAttention(
            12, 4, heads, resolution=4, kernels=(5, 3, 3), **args
        ),
        tokens=False,
        fast=fast,
    )


def bottleneck(**args: Any) -> LayerCase:
    return LayerCase(
        lambda: BottleneckAttn(12, 18, feat_size=(4, 4), num_heads=3, dim_head=4, **args),
        tokens=False,
        out=18,
        whole=parts.NOT_PROJECTED,
    )


def halo(**args: Any) -> LayerCase:
    return LayerCase(
        lambda: HaloAttn(12, 18, num_heads=3, dim_head=4, block_size=2, halo_size=1, **args),
        tokens=False,
        out=18,
        whole=parts.NOT_PROJECTED,
    )


def lambdas(**args: Any) -> LayerCase:
    return LayerCase(
        lambda: LambdaLayer(12, feat_size=(4, 4), num_heads=3, dim_head=5, **args),
        tokens=False,
        whole=parts.NOT_PROJECTED,
    )


CASES: Cases = {
    coat.FactorAttnConvRelPosEnc: {
        "": ModelCase(
            "coat_lite_tiny", {"img_size": 64, "embed_dims": (16, 24, 32, 48), "serial_depths": (1, 1, 1, 2)}
        ),
        "parallel": ModelCase(
            "coat_tiny",
            {"img_size": 64, "embed_dims": (16,) * 4, "serial_depths": (2, 1, 1, 1), "parallel_depth": 1},
        ),
    },
    xcit.XCA: {
        "": LayerCase(lambda: xcit.XCA(12, 3, qkv_bias=True), fast=True, **IN_DAVIT),
        "model": ModelCase(
            "xcit_tiny_12_p8_224",
            {"depth": 1, "embed_dim": 32, "num_heads": 2, "cls_attn_layers": 1},
            32,
            flops="85%",
            **IN_DAVIT,
        ),
    },
    edgenext.CrossCovarianceAttn: {
        "": LayerCase(lambda: edgenext.CrossCovarianceAttn(12, 3), **IN_DAVIT),
        "model": ModelCase(
            "edgenext_xx_small",
            {"dims": (16, 16, 32, 32), "depths": (1, 2, 2, 2)},
            64,
            flops="85%",
            **IN_DAVIT,
        ),
    },
    davit.ChannelAttention: {"": LayerCase(lambda: davit.ChannelAttention(12, 3, qkv_bias=True), **IN_DAVIT)},
    davit.ChannelAttentionV2: {
        "": LayerCase(lambda: davit.ChannelAttentionV2(12, 3), **IN_DAVIT),
        "scaled by width": LayerCase(
            lambda: davit.ChannelAttentionV2(12, 3, dynamic_scale=False), **IN_DAVIT
        ),
    },
    efficientformer_v2.Attention2d: {
        "": LayerCase(
            lambda: efficientformer_v2.Attention2d(12, 4, 3, attn_ratio=2, resolution=4), tokens=False
        ),
        "coarser": LayerCase(
            lambda: efficientformer_v2.Attention2d(12, 4, 3, attn_ratio=2, resolution=4, stride=2),
            tokens=False,
        ),
        "model": ModelCase(
            "efficientformerv2_s0",
            {"img_size": 64, "embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_vit": 1},
            flops="85%",
        ),
    },
    efficientformer_v2.Attention2dDownsample: {
        "": LayerCase(
            lambda: efficientformer_v2.Attention2dDownsample(12, 4, 3, attn_ratio=2, resolution=4),
            tokens=False,
        )
    },
    volo.OutlookAttention: {
        "": LayerCase(lambda: ChannelsLast(volo.OutlookAttention(12, 3, qkv_bias=True)), tokens=False),
        "strided": LayerCase(
            lambda: ChannelsLast(volo.OutlookAttention(12, 3, stride=2)), tokens=False, side=5
        ),
    },
    mobilevit.LinearSelfAttention: {
        "": LayerCase(lambda: mobilevit.LinearSelfAttention(12), tokens=False),
        "model": ModelCase("mobilevitv2_050", {}, 64, flops="85%"),
    },
    shvit.SHSA: {
        "": LayerCase(lambda: shvit.SHSA(12, 4, 5), tokens=False),
        "model": ModelCase(
            "shvit_s1",
            {"embed_dim": (16, 32, 48), "depth": (1, 1, 1), "partial_dim": (8, 16, 16)},
            128,
            flops="85%",
        ),
    },
    iformer.SHMA: {
        "": LayerCase(lambda: iformer.SHMA(12), tokens=False, revived=("v",)),
        "windows": LayerCase(lambda: iformer.SHMA(12, window_size=3), tokens=False, revived=("v",)),
        "model": ModelCase(
            "iformer_t",
            {"dims": (8, 16, 32, 32), "depths": (1, 1, 4, 3), "attn_groups": (0, 0, 1, 1)},
            64,
            revived=("v",),
            flops="85%",
        ),
    },
    efficientvit_mit.LiteMLA: {
        "": multi_scale(fast=True),
        "biases and scales": multi_scale(use_bias=(True, True), scales=(3, 5)),
        "norm in front": multi_scale(norm_layer=(nn.BatchNorm2d, nn.BatchNorm2d)),
        "model": ModelCase(
            "efficientvit_b0",
            {"widths": (8, 8, 16, 16, 32), "depths": (1, 1, 1, 1), "head_dim": 8},
            64,
            flops="99%",
            adapt=in_double,
        ),
    },
    efficientvit_msra.CascadedGroupAttention: {
        "": cascaded(3, attn_ratio=1, fast=True),
        "wider values": cascaded(2, attn_ratio=1.5),
        "one head": cascaded(1, attn_ratio=3),
        "model": ModelCase(
            "efficientvit_m0",
            {
                "img_size": 128,
                "embed_dim": (16, 24, 32),
                "key_dim": (8, 8, 8),
                "depth": (1, 1, 1),
                "num_heads": (2, 2, 2),
            },
            flops="85%",
        ),
    },
    swiftformer.EfficientAdditiveAttention: {
        "": LayerCase(lambda: swiftformer.EfficientAdditiveAttention(12, 12), tokens=False, fast=True),
        "two heads": LayerCase(lambda: swiftformer.EfficientAdditiveAttention(12, 8, 2), tokens=False, out=8),
        "model": ModelCase(
            "swiftformer_xs", {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 24, 32)}, 64, flops="85%"
        ),
    },
    BottleneckAttn: {"": bottleneck(), "biases": bottleneck(qkv_bias=True, scale_pos_embed=True, stride=2)},
    HaloAttn: {
        "": halo(),
        "biases": halo(qkv_bias=True, scale_pos_embed=True),
        "strided": halo(stride=2),
        "pooled": halo(stride=2, avg_down=True),
    },
    LambdaLayer: {
        "": lambdas(r=3),
        "biases": lambdas(r=3, qkv_bias=True, stride=2),
        "table": lambdas(r=None),
    },
    gemma4_vit.Gemma4Attention: {
        "": ModelCase(
            "gemma4_vit_167m",
            {
                "depth": 1,
                "embed_dim": 24,
                "num_heads": 2,
                "head_dim": 12,
                "intermediate_size": 64,
                "position_embedding_size": 16,
            },
            64,
            whole=parts.ALL_NORMALISED,
            flops="85%",
            adapt=parts.clip,
        )
    },
    SpatialTransformerBlock: {
        "": LayerCase(SpatialTransformerBlock, dim=1, side=7, tokens=False, whole=parts.SINGLE_CHANNEL),
        "model": ModelCase(
            "csatv2",
            {"dims": (16, 24, 32, 32), "depths": (1, 1, 2, 2), "transformer_depths": (0, 0, 1, 1)},
            128,
            whole=parts.SINGLE_CHANNEL,
            flops="85%",
        ),
    },
}
