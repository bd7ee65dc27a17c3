"""Layers of timm beside ``layers.Attention``, each alone between image and logits, and small models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import timm
import torch
from timm.layers import (
    Attention,
    AttentionPoolLatent,
    ConvMlp,
    DiffAttention,
    LayerNorm2d,
    MultiQueryAttention2d,
    RelPosBias,
)
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from timm.layers.lambda_layer import LambdaLayer
from timm.models import (
    cait,
    convit,
    cpubone,
    crossvit,
    davit,
    edgenext,
    efficientformer,
    efficientformer_v2,
    efficientvit_mit,
    efficientvit_msra,
    fastvit,
    gemma4_vit,
    iformer,
    levit,
    lowformer,
    maxxvit,
    mobilevit,
    nextvit,
    shvit,
    swiftformer,
    tiny_vit,
    tnt,
    twins,
    visformer,
    vitamin,
    volo,
    xcit,
)
from timm.models.csatv2 import SpatialTransformerBlock
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock
from torch import Tensor, nn


class Alone(nn.Module):
    """One layer on a map of 4x4 points, or on the points as tokens; pooled to logits.

    In front of an MLP there is attention, since nothing without attention is cut.
    """

    def __init__(self, case: LayerCase) -> None:
        super().__init__()
        self.before = Attention(case.dim, num_heads=2) if case.mlp else None
        self.layer, self.tokens, self.args = case.make(), case.tokens, case.args
        self.head = nn.Linear(case.out or case.dim, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = image.flatten(2).transpose(1, 2)
        if self.before is not None:
            x = x + self.before(x)
        if not self.tokens:
            x = x.transpose(1, 2).unflatten(2, image.shape[2:])
        x = self.layer(x, *self.args)
        if self.tokens:
            x = x.transpose(1, 2)
        return self.head(x.flatten(2).mean(-1))


class ChannelsLast(nn.Module):
    """A layer of [B, H, W, C] behind an interface of [B, C, H, W]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class LayerCase:
    """How to make one layer."""

    make: Callable[[], nn.Module]
    dim: int = 12
    tokens: bool = True
    args: tuple = ()
    mlp: bool = False
    """Whether it is an MLP."""
    out: int | None = None
    """Of what it gives, where that is not ``dim``."""
    side: int = 4
    revived: tuple[str, ...] = ()
    """Units whose channels do not end when all that they are made of is zero."""

    size = property(lambda self: (self.dim, self.side, self.side))

    def create(self) -> nn.Module:
        return Alone(self)


@dataclass(frozen=True)
class ModelCase:
    """A timm model at test size."""

    architecture: str
    args: dict[str, Any] = field(default_factory=dict)
    side: int = 64
    revived: tuple[str, ...] = ()
    flops: str = "85%"
    """A budget within reach."""

    size = property(lambda self: (3, self.side, self.side))

    def create(self) -> nn.Module:
        model = timm.create_model(self.architecture, num_classes=5, **self.args)
        for module in model.modules():
            if type(module) is efficientvit_mit.LiteMLA:
                _in_double(module)
        return clipped(model)


def _maxxvit(cls: type, *, tokens: bool = False, **args: Any) -> LayerCase:
    rel_pos = partial(RelPosBias, window_size=(4, 4))
    return LayerCase(
        lambda: cls(12, dim_head=4, rel_pos_cls=rel_pos, **args), tokens=tokens, out=args.get("dim_out")
    )


def _mlp(make: Callable[[], nn.Module], *, tokens: bool = False) -> LayerCase:
    return LayerCase(make, tokens=tokens, mlp=True)


MLPS = {
    "ConvMlp": _mlp(lambda: ConvMlp(12, 20)),
    "ConvMlp, batch norm": _mlp(lambda: ConvMlp(12, 20, norm_layer=nn.BatchNorm2d, bias=False)),
    "levit": _mlp(lambda: levit.LevitMlp(12, 20), tokens=True),
    "levit, convolutions": _mlp(lambda: levit.LevitMlp(12, 20, use_conv=True)),
    "vitamin": _mlp(lambda: vitamin.GeGluMlp(12, 20), tokens=True),
    "fastvit": _mlp(lambda: fastvit.ConvMlp(12, 20)),
    "tiny_vit": _mlp(lambda: tiny_vit.NormMlp(12, 20), tokens=True),
    "swiftformer": _mlp(lambda: swiftformer.Mlp(12, 20)),
    "efficientformer": _mlp(lambda: efficientformer.ConvMlpWithNorm(12, 20)),
    "efficientformer, no norm": _mlp(lambda: efficientformer.ConvMlpWithNorm(12, 20, norm_layer=None)),
    "efficientformer_v2": _mlp(lambda: efficientformer_v2.ConvMlpWithNorm(12, 20)),
    "efficientformer_v2, depthwise": _mlp(
        lambda: efficientformer_v2.ConvMlpWithNorm(12, 20, mid_conv=True, act_layer=nn.GELU)
    ),
    "efficientvit_msra": _mlp(lambda: efficientvit_msra.ConvMlp(12, 20)),
    "shvit": _mlp(lambda: shvit.FFN(12, 20)),
    "iformer": _mlp(lambda: iformer.FFN(12, 2)),
    "iformer, scaled": _mlp(lambda: iformer.FFN(12, 2, layer_scale_init_value=0.5)),
    "visformer": _mlp(lambda: visformer.SpatialMlp(12, 20)),
    "gemma4": _mlp(lambda: gemma4_vit.Gemma4GatedMlp(12, 20), tokens=True),
    "gemma4, clipped": _mlp(
        lambda: clipped(gemma4_vit.Gemma4GatedMlp(12, 20, use_clipped_linears=True)), tokens=True
    ),
}
_NORMALISED = "q and k are normalised over the channels of a head"
_NORM_WITHIN = "a norm before the projection runs over the v channels of a head"
_ALL_NORMALISED = "q, k and v are normalised over the channels of a head"
WHOLE = {
    "parallel, normalised": (
        LayerCase(lambda: ParallelScalingBlock(12, 3, 2.0, qk_norm=True)),
        {"qk": _NORMALISED},
    ),
    "diff": (LayerCase(lambda: DiffAttention(12, 2)), {"v": _NORM_WITHIN}),
    "diff, normalised": (
        LayerCase(lambda: DiffAttention(12, 2, qk_norm=True)),
        {"qk": _NORMALISED, "v": _NORM_WITHIN},
    ),
    "parallel diff": (LayerCase(lambda: DiffParallelScalingBlock(12, 2, 2.0)), {"v": _NORM_WITHIN}),
    "gemma4": (
        LayerCase(lambda: gemma4_vit.Gemma4Attention(12, 3, 4)),
        {"qk": _ALL_NORMALISED, "v": _ALL_NORMALISED},
    ),
    "pooling, normalised": (
        LayerCase(lambda: AttentionPoolLatent(12, num_heads=3, qk_norm=True, pool_type="")),
        {
            "qk": "q and k are normalised over the channels of a head",
            "hidden": "in a pooling head it costs next to nothing",
        },
    ),
    "csatv2": (
        LayerCase(SpatialTransformerBlock),
        {"qk": "q, k and v are a single channel", "v": "q, k and v are a single channel"},
    ),
    "ConvMlp, layer norm": (
        _mlp(lambda: ConvMlp(12, 20, norm_layer=LayerNorm2d)),
        {"hidden": "a norm runs over all hidden channels"},
    ),
    "visformer, in groups": (
        _mlp(lambda: visformer.SpatialMlp(16, 20, spatial_conv=True, group=8)),
        {"hidden": "a convolution mixes hidden channels"},
    ),
}
"""What of a layer must stay, and why."""
ATTENTION = {
    "cait class": LayerCase(lambda: cait.ClassAttn(12, 3)),
    "cait class, biases": LayerCase(lambda: cait.ClassAttn(12, 2, qkv_bias=True)),
    "crossvit": LayerCase(lambda: crossvit.CrossAttention(12, 3, qkv_bias=True)),
    "volo class": LayerCase(lambda: volo.ClassAttention(12, 3, qkv_bias=True)),
    "nextvit": LayerCase(lambda: nextvit.EfficientAttention(12, head_dim=4)),
    "nextvit, reduced": LayerCase(lambda: nextvit.EfficientAttention(12, head_dim=4, sr_ratio=2)),
    "twins global": LayerCase(lambda: twins.GlobalSubSampleAttn(12, 3), args=((4, 4),)),
    "twins global, reduced": LayerCase(lambda: twins.GlobalSubSampleAttn(12, 3, sr_ratio=2), args=((4, 4),)),
    "tnt": LayerCase(lambda: tnt.Attention(12, 12, 3)),
    "tnt, narrow": LayerCase(lambda: tnt.Attention(12, 8, 2, qkv_bias=True)),
    "convit": LayerCase(lambda: convit.GPSA(12, 3, qkv_bias=True)),
    "maxxvit": _maxxvit(maxxvit.Attention2d),
    "maxxvit, wider": _maxxvit(maxxvit.Attention2d, dim_out=16),
    "maxxvit, wider behind": _maxxvit(maxxvit.Attention2d, dim_out=16, expand_first=False),
    "maxxvit, over heads": _maxxvit(maxxvit.Attention2d, head_first=False, bias=False),
    "maxxvit channels last": _maxxvit(maxxvit.AttentionCl, tokens=True),
    "maxxvit channels last, over heads": _maxxvit(maxxvit.AttentionCl, tokens=True, head_first=False),
    "levit": LayerCase(lambda: levit.Attention(12, 4, 3, attn_ratio=2, resolution=4)),
    "levit, convolutions": LayerCase(
        lambda: levit.Attention(12, 4, 3, attn_ratio=1.5, resolution=4, use_conv=True), tokens=False
    ),
    "levit downsampling": LayerCase(
        lambda: levit.AttentionDownsample(12, 12, 4, 3, attn_ratio=2, resolution=4)
    ),
    "levit downsampling, convolutions": LayerCase(
        lambda: levit.AttentionDownsample(12, 12, 4, 2, resolution=4, use_conv=True, use_pool=True),
        tokens=False,
    ),
    "efficientformer": LayerCase(lambda: efficientformer.Attention(12, 4, 3, attn_ratio=2, resolution=4)),
    "tiny_vit": LayerCase(lambda: tiny_vit.Attention(12, 4, 3, attn_ratio=1, resolution=(4, 4))),
    "lowformer": LayerCase(
        lambda: lowformer.ConvAttention(60, 1.0, att_stride=2, att_kernel=5), dim=60, tokens=False
    ),
    "lowformer, not coarser": LayerCase(
        lambda: lowformer.ConvAttention(12, att_stride=1, att_kernel=3), tokens=False
    ),
    "cpubone": LayerCase(lambda: cpubone.ConvAttention(60, att_stride=2, att_kernel=5), dim=60, tokens=False),
    "cpubone, fused": LayerCase(
        lambda: cpubone.ConvAttention(12, att_stride=2, fuse_out_proj=True), tokens=False
    ),
    "lowformer, fused": LayerCase(
        lambda: lowformer.ConvAttention(60, 1.0, att_stride=1, att_kernel=3, fuse_out_proj=True),
        dim=60,
        tokens=False,
    ),
    "pooling": LayerCase(
        lambda: AttentionPoolLatent(12, num_heads=3, norm_layer=nn.LayerNorm, latent_len=4, pool_type="")
    ),
    "pooling, positions": LayerCase(
        lambda: AttentionPoolLatent(
            12, 20, num_heads=3, latent_len=2, latent_dim=8, pos_embed="abs", feat_size=16, pool_type=""
        ),
        out=20,
    ),
    "pooling, normalised": LayerCase(
        lambda: AttentionPoolLatent(12, num_heads=3, qk_norm=True, qkv_bias=False, pool_type="")
    ),
    "multi query": LayerCase(lambda: MultiQueryAttention2d(12, num_heads=3, use_bias=True), tokens=False),
    "cpubone, nearest": LayerCase(
        lambda: cpubone.ConvAttention(12, att_stride=2, small_kernels=True, upsample_mode="nearest"),
        tokens=False,
        side=5,
    ),
    "cpubone, not coarser": LayerCase(
        lambda: cpubone.ConvAttention(12, att_stride=1, small_kernels=True), tokens=False
    ),
    "cpubone, nearest and fused": LayerCase(
        lambda: cpubone.ConvAttention(12, att_stride=2, upsample_mode="nearest", fuse_out_proj=True),
        tokens=False,
    ),
    "xcit": LayerCase(lambda: xcit.XCA(12, 3, qkv_bias=True), revived=("v",)),
    "efficientformer_v2": LayerCase(
        lambda: efficientformer_v2.Attention2d(12, 4, 3, attn_ratio=2, resolution=4), tokens=False
    ),
    "efficientformer_v2, coarser": LayerCase(
        lambda: efficientformer_v2.Attention2d(12, 4, 3, attn_ratio=2, resolution=4, stride=2), tokens=False
    ),
    "efficientformer_v2, downsampling": LayerCase(
        lambda: efficientformer_v2.Attention2dDownsample(12, 4, 3, attn_ratio=2, resolution=4), tokens=False
    ),
    "volo outlook": LayerCase(
        lambda: ChannelsLast(volo.OutlookAttention(12, 3, qkv_bias=True)), tokens=False
    ),
    "volo outlook, strided": LayerCase(
        lambda: ChannelsLast(volo.OutlookAttention(12, 3, stride=2)), tokens=False, side=5
    ),
    "mobilevitv2": LayerCase(lambda: mobilevit.LinearSelfAttention(12), tokens=False),
    "edgenext": LayerCase(lambda: edgenext.CrossCovarianceAttn(12, 3), revived=("v",)),
    "davit channels": LayerCase(lambda: davit.ChannelAttention(12, 3, qkv_bias=True), revived=("v",)),
    "davit channels v2": LayerCase(lambda: davit.ChannelAttentionV2(12, 3), revived=("v",)),
    "davit channels v2, scaled by width": LayerCase(
        lambda: davit.ChannelAttentionV2(12, 3, dynamic_scale=False), revived=("v",)
    ),
    "shvit": LayerCase(lambda: shvit.SHSA(12, 4, 5), tokens=False),
    "iformer": LayerCase(lambda: iformer.SHMA(12), tokens=False, revived=("v",)),
    "iformer, windows": LayerCase(lambda: iformer.SHMA(12, window_size=3), tokens=False, revived=("v",)),
}


def _in_double(module: efficientvit_mit.LiteMLA) -> nn.Module:
    """``module``, which computes in single precision whatever it is given, without that."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q @ (k.transpose(-1, -2) @ v)
        return out[..., :-1] / (out[..., -1:] + self.eps)

    module._attn = MethodType(attend, module)
    return module


def _multi_scale(**args: Any) -> LayerCase:
    return LayerCase(lambda: _in_double(efficientvit_mit.LiteMLA(12, 12, dim=4, **args)), tokens=False)


ATTENTION |= {
    "efficientvit_mit": _multi_scale(),
    "efficientvit_mit, biases and scales": _multi_scale(use_bias=(True, True), scales=(3, 5)),
    "efficientvit_mit, norm in front": _multi_scale(norm_layer=(nn.BatchNorm2d, nn.BatchNorm2d)),
}


def _cascaded(heads: int, **args: Any) -> LayerCase:
    return LayerCase(
        lambda: efficientvit_msra.CascadedGroupAttention(
            12, 4, heads, resolution=4, kernels=(5, 3, 3), **args
        ),
        tokens=False,
    )


ATTENTION |= {
    "efficientvit_msra": _cascaded(3, attn_ratio=1),
    "efficientvit_msra, wider values": _cascaded(2, attn_ratio=1.5),
    "efficientvit_msra, one head": _cascaded(1, attn_ratio=3),
}
ATTENTION |= {
    "swiftformer": LayerCase(lambda: swiftformer.EfficientAdditiveAttention(12, 12), tokens=False),
    "swiftformer, two heads": LayerCase(
        lambda: swiftformer.EfficientAdditiveAttention(12, 8, 2), tokens=False, out=8
    ),
}
ATTENTION |= {
    "diff": LayerCase(lambda: DiffAttention(12, 2, qkv_bias=True, depth=1)),
    "diff, scalars": LayerCase(lambda: DiffAttention(12, 3, scale_norm=True, dual_lambda=True)),
    "parallel": LayerCase(lambda: ParallelScalingBlock(12, 3, 2.0)),
    "parallel, biases": LayerCase(lambda: ParallelScalingBlock(12, 3, 2.0, qkv_bias=True, init_values=0.5)),
    "parallel, fused": LayerCase(
        lambda: ParallelScalingBlock(12, 2, 2.0, qkv_bias=True, proj_bias=False, fuse_out_proj=True)
    ),
    "parallel diff": LayerCase(lambda: DiffParallelScalingBlock(12, 2, 2.0, init_values=0.5)),
    "parallel diff, biases": LayerCase(
        lambda: DiffParallelScalingBlock(12, 2, 2.0, qkv_bias=True, dual_lambda=True)
    ),
}


def _bottleneck(**args: Any) -> LayerCase:
    return LayerCase(
        lambda: BottleneckAttn(12, 18, feat_size=(4, 4), num_heads=3, dim_head=4, **args),
        tokens=False,
        out=18,
    )


def _halo(**args: Any) -> LayerCase:
    return LayerCase(
        lambda: HaloAttn(12, 18, num_heads=3, dim_head=4, block_size=2, halo_size=1, **args),
        tokens=False,
        out=18,
    )


ATTENTION |= {
    "bottleneck": _bottleneck(),
    "bottleneck, biases": _bottleneck(qkv_bias=True, scale_pos_embed=True, stride=2),
    "halo": _halo(),
    "halo, biases": _halo(qkv_bias=True, scale_pos_embed=True),
    "halo, strided": _halo(stride=2),
    "halo, pooled": _halo(stride=2, avg_down=True),
}


def _lambda(**args: Any) -> LayerCase:
    return LayerCase(lambda: LambdaLayer(12, feat_size=(4, 4), num_heads=3, dim_head=5, **args), tokens=False)


ATTENTION |= {
    "lambda": _lambda(r=3),
    "lambda, biases": _lambda(r=3, qkv_bias=True, stride=2),
    "lambda, table": _lambda(r=None),
}
LAYERS = {**{f"mlp {name}": case for name, case in MLPS.items()}, **ATTENTION}
_SMALL_VIT = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2, "mlp_ratio": 2}
MODELS = {
    "xcit model": ModelCase(
        "xcit_tiny_12_p8_224",
        {"depth": 1, "embed_dim": 32, "num_heads": 2, "cls_attn_layers": 1},
        side=32,
        revived=("v",),
    ),
    "crossvit model": ModelCase(
        "crossvit_9_dagger_240",
        {
            "img_size": 120,
            "embed_dim": (16, 24),
            "depth": ((1, 1, 0),),
            "num_heads": (2, 2),
            "mlp_ratio": (2.0, 2.0, 1.0),
        },
        side=120,
    ),
    "nextvit model": ModelCase("nextvit_small", {"depths": (1, 1, 5, 1), "stem_chs": (16, 8, 16)}),
    "twins model": ModelCase(
        "twins_pcpvt_small",
        {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dims": (16, 24, 32, 48), "num_heads": (1, 2, 2, 4)},
    ),
    "tnt model": ModelCase(
        "tnt_s_patch16_224",
        {
            "img_size": 32,
            "depth": 1,
            "embed_dim": 32,
            "inner_dim": 8,
            "num_heads_inner": 2,
            "num_heads_outer": 2,
        },
        side=32,
    ),
    "convit model": ModelCase(
        "convit_tiny",
        {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 4, "local_up_to_layer": 2},
        side=32,
    ),
    "maxvit model": ModelCase(
        "maxvit_rmlp_pico_rw_256",
        {"img_size": 64, "depths": (1, 1), "embed_dim": (32, 32), "stem_width": 16},
    ),
    "maxvit model, tf": ModelCase(
        "maxvit_tiny_tf_224",
        {"img_size": 64, "depths": (1, 1), "embed_dim": (32, 32), "stem_width": 16},
    ),
    "coatnet model": ModelCase(
        "coatnet_nano_rw_224",
        {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64), "stem_width": (16, 32)},
        flops="93%",
    ),
    "maxxvit model": ModelCase(
        "maxxvitv2_nano_rw_256",
        {"img_size": 64, "depths": (1, 1), "embed_dim": (32, 32), "stem_width": 16},
    ),
    "levit model": ModelCase(
        "levit_128s",
        {"img_size": 96, "embed_dim": (16, 24, 32), "key_dim": 8, "num_heads": (2, 2, 2), "depth": (1, 1, 1)},
        side=96,  # of 64 a single token would be left, whose q and k do not matter
    ),
    "levit model, convolutions": ModelCase(
        "levit_conv_256d",
        {"img_size": 64, "embed_dim": (16, 24), "key_dim": 8, "num_heads": (2, 2), "depth": (1, 1)},
    ),
    "efficientformer model": ModelCase(
        "efficientformer_l1",
        {"embed_dims": (8, 8, 16, 24), "depths": (1, 1, 1, 2)},
        side=224,
    ),
    "tiny_vit model": ModelCase(
        "tiny_vit_5m_224",
        {
            "embed_dims": (16, 32, 32, 32),
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 2, 2, 2),
            "window_sizes": (2, 2, 2, 2),
        },
    ),
    "lowformer model": ModelCase(
        "lowformer_b0",
        {"width_list": (8, 8, 16, 32, 64), "depth_list": (0, 0, 0, 1, 1), "head_widths": (32, 32)},
        flops="99%",
    ),
    "cpubone model": ModelCase(
        "cpubone_nano",
        {"width_list": (8, 8, 16, 32, 64), "depth_list": (0, 0, 0, 1, 1), "head_widths": (32, 32)},
        flops="95%",
    ),
    "edgenext model": ModelCase(
        "edgenext_xx_small", {"dims": (16, 16, 32, 32), "depths": (1, 2, 2, 2)}, revived=("v",)
    ),
    "efficientformer_v2 model": ModelCase(
        "efficientformerv2_s0",
        {"img_size": 64, "embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_vit": 1},
    ),
    "mobilevitv2 model": ModelCase("mobilevitv2_050"),
    "shvit model": ModelCase(
        "shvit_s1",
        {"embed_dim": (16, 32, 48), "depth": (1, 1, 1), "partial_dim": (8, 16, 16)},
        side=128,
    ),
    "iformer model": ModelCase(
        "iformer_t",
        {"dims": (8, 16, 32, 32), "depths": (1, 1, 4, 3), "attn_groups": (0, 0, 1, 1)},
        revived=("v",),
    ),
    "efficientvit_mit model": ModelCase(
        "efficientvit_b0", {"widths": (8, 8, 16, 16, 32), "depths": (1, 1, 1, 1), "head_dim": 8}, flops="99%"
    ),
    "efficientvit_msra model": ModelCase(
        "efficientvit_m0",
        {
            "img_size": 128,
            "embed_dim": (16, 24, 32),
            "key_dim": (8, 8, 8),
            "depth": (1, 1, 1),
            "num_heads": (2, 2, 2),
        },
        side=128,
    ),
    "swiftformer model": ModelCase(
        "swiftformer_xs", {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 24, 32)}
    ),
    "diff model": ModelCase("vit_dwee_patch16_reg1_gap_256", _SMALL_VIT, side=32),
    "parallel model": ModelCase("vit_pwee_patch16_reg1_gap_256", _SMALL_VIT, side=32),
    "parallel model, normalised": ModelCase("vit_base_patch16_xp_224", _SMALL_VIT, side=32),
    "parallel diff model": ModelCase("vit_dpwee_patch16_reg1_gap_256", _SMALL_VIT, side=32),
    "gemma4 model": ModelCase(
        "gemma4_vit_167m",
        {
            "depth": 1,
            "embed_dim": 24,
            "num_heads": 2,
            "head_dim": 12,
            "intermediate_size": 64,
            "position_embedding_size": 16,
        },
    ),
    "csatv2 model": ModelCase(
        "csatv2",
        {"dims": (16, 24, 32, 32), "depths": (1, 1, 2, 2), "transformer_depths": (0, 0, 1, 1)},
        side=128,
    ),
    "vitamin model": ModelCase("vitamin_small_224", {"img_size": 64, "depth": 1}),
}
CASES: dict[str, LayerCase | ModelCase] = {
    **LAYERS,
    **MODELS,
}


def clipped(module: nn.Module) -> nn.Module:
    """``module`` with clamps that bite."""
    for name, buffer in module.named_buffers():
        if name.endswith(("_min", "_max")):
            buffer.fill_(-0.7 if name.endswith("min") else 0.8)
    return module


def build(case: LayerCase | ModelCase, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """In eval mode, far from initial values, batch norms included, so that everything matters."""
    torch.manual_seed(seed)
    model = case.create().double()
    model.eval()  # of some of timm's attention it returns None
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and name.endswith("weight"):
                parameter.copy_(noise(parameter) / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.3 * noise(parameter))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.add_(0.5)
                module.running_mean.add_(0.3 * noise(module.running_mean))
                module.running_var.mul_(0.5 + noise(module.running_var).abs())
    return model.to(dtype)


def image(case: LayerCase | ModelCase, *, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *case.size, generator=generator, dtype=torch.float64).to(dtype)
