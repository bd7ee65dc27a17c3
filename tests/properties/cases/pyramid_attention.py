"""Softmax attention of timm's hierarchical models: windows, reduced keys, points instead of tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import RelPosBias
from timm.layers.attention2d import MultiQueryAttention2d
from timm.models import (
    cpubone,
    davit,
    efficientformer,
    fastvit,
    gcvit,
    hiera,
    hieradet_sam2,
    levit,
    lowformer,
    maxxvit,
    metaformer,
    mvitv2,
    nest,
    nextvit,
    pvt_v2,
    swin_transformer,
    swin_transformer_v2,
    swin_transformer_v2_cr,
    tiny_vit,
    twins,
    visformer,
    volo,
)
from torch import nn

from helpers.models import LayerCase, ModelCase
from properties.cases import parts

Cases = dict[type[nn.Module], dict[str, LayerCase | ModelCase]]
SWIN_V2 = {"img_size": 64, "embed_dim": 24, "num_heads": (3, 4), "window_size": 4}


def grid(cls: type, *, tokens: bool = False, **args: Any) -> LayerCase:
    rel_pos = partial(RelPosBias, window_size=(4, 4))
    return LayerCase(
        lambda: cls(12, dim_head=4, rel_pos_cls=rel_pos, **args), tokens=tokens, out=args.get("dim_out")
    )


CASES: Cases = {
    metaformer.Attention: {
        "": ModelCase(
            "small_caformer", {"depths": (1, 1, 1, 2), "dims": (16, 16, 32, 64)}, 64, revived=("hidden",)
        )
    },
    fastvit.Attention: {
        "": ModelCase(
            "fastvit_sa12", {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 16, 64)}, 64, flops="98%"
        )
    },
    volo.Attention: {
        "": ModelCase(
            "small_volo",
            {
                "img_size": 32,
                "layers": (1, 1, 1, 1),
                "embed_dims": (16, 32, 32, 32),
                "num_heads": (2, 2, 2, 4),
                "outlook_attention": (False, False, False, False),
                "post_layers": (),
                "global_pool": "avg",
                "use_aux_head": False,
                "stem_hidden_dim": 8,
            },
            flops="90%",
        )
    },
    visformer.Attention: {
        "": ModelCase(
            "visformer_tiny",
            {"img_size": 64, "depth": (0, 1, 1), "embed_dim": 48, "num_heads": 3},
            flops="95%",
        )
    },
    nest.Attention: {
        "": ModelCase(
            "small_nest",
            {"img_size": 32, "embed_dims": (16, 32, 48), "num_heads": (2, 4, 3), "depths": (1, 1, 1)},
            fast=True,
        )
    },
    davit.WindowAttention: {
        "": ModelCase(
            "davit_tiny",
            {
                "depths": (1, 1),
                "embed_dims": (16, 32),
                "num_heads": (2, 4),
                "window_size": 3,
                "attn_types": ("spatial",),
            },
            32,
        )
    },
    twins.LocallyGroupedAttn: {
        "": ModelCase(
            "twins_svt_small",
            {
                "img_size": 32,
                "depths": (1, 1, 1, 1),
                "embed_dims": (16, 24, 32, 32),
                "num_heads": (1, 2, 4, 4),
                "wss": (3, 3, 3, 2),
            },
        )
    },
    twins.GlobalSubSampleAttn: {
        "": LayerCase(lambda: twins.GlobalSubSampleAttn(12, 3), args=((4, 4),)),
        "reduced": LayerCase(lambda: twins.GlobalSubSampleAttn(12, 3, sr_ratio=2), args=((4, 4),)),
        "model": ModelCase(
            "twins_pcpvt_small",
            {
                "img_size": 64,
                "depths": (1, 1, 1, 1),
                "embed_dims": (16, 24, 32, 48),
                "num_heads": (1, 2, 2, 4),
            },
            flops="85%",
        ),
    },
    nextvit.EfficientAttention: {
        "": LayerCase(lambda: nextvit.EfficientAttention(12, head_dim=4)),
        "reduced": LayerCase(lambda: nextvit.EfficientAttention(12, head_dim=4, sr_ratio=2)),
        "model": ModelCase(
            "nextvit_small", {"depths": (1, 1, 5, 1), "stem_chs": (16, 8, 16)}, 64, flops="85%"
        ),
    },
    gcvit.WindowAttentionGlobal: {
        "": ModelCase(
            "small_gcvit",
            {
                "img_size": 64,
                "depths": (2, 2),
                "num_heads": (2, 4),
                "window_ratio": (32, 16),
                "embed_dim": 16,
            },
        )
    },
    hiera.MaskUnitAttention: {
        "": ModelCase(
            "hiera_tiny_224",
            {
                "img_size": 64,
                "embed_dim": 16,
                "num_heads": 2,
                "stages": (1, 1, 2),
                "q_pool": 2,
                "mask_unit_attn": (True, True, False),
                "mask_unit_size": (4, 4),
            },
        )
    },
    hieradet_sam2.MultiScaleAttention: {
        "": ModelCase(
            "sam2_hiera_tiny",
            {
                "embed_dim": 16,
                "num_heads": 2,
                "stages": (1, 2, 2),
                "q_pool": 2,
                "window_spec": (4, 2, 2),
                "global_att_blocks": (4,),
            },
            64,
        )
    },
    swin_transformer.WindowAttention: {
        "": ModelCase(
            "swin_tiny_patch4_window7_224",
            {"img_size": 64, "depths": (1, 2, 1, 1), "embed_dim": 24, "window_size": 2},
            fast=True,
        )
    },
    swin_transformer_v2.WindowAttention: {
        "": ModelCase("swinv2_tiny_window8_256", {**SWIN_V2, "depths": (2, 1)}, fast=True),
        "no biases": ModelCase(
            "swinv2_tiny_window8_256", {**SWIN_V2, "depths": (1, 1), "window_size": 8, "qkv_bias": False}
        ),
    },
    swin_transformer_v2_cr.WindowMultiHeadAttention: {
        "": ModelCase("swinv2_cr_tiny_224", {**SWIN_V2, "depths": (2, 1)})
    },
    pvt_v2.Attention: {
        # Two of its stages reduce their keys by a convolution; with pooling, all.
        "": ModelCase(
            "pvt_v2_b0",
            {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 40, 64), "sr_ratios": (4, 2, 1, 1)},
            64,
            fast=True,
        ),
        "pooled": ModelCase("pvt_v2_b2_li", {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 40, 64)}, 64),
    },
    MultiQueryAttention2d: {
        "": LayerCase(lambda: MultiQueryAttention2d(12, num_heads=3, use_bias=True), tokens=False),
        "model": ModelCase("small_multi_query", {}, 64),
    },
    mvitv2.MultiScaleAttention: {"": ModelCase("small_mvitv2", {"img_size": 64}, whole=parts.ALL_NORMALISED)},
    maxxvit.Attention2d: {
        "": grid(maxxvit.Attention2d),
        "wider": grid(maxxvit.Attention2d, dim_out=16),
        "wider behind": grid(maxxvit.Attention2d, dim_out=16, expand_first=False),
        "over heads": grid(maxxvit.Attention2d, head_first=False, bias=False),
        "model": ModelCase(
            "coatnet_nano_rw_224",
            {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64), "stem_width": (16, 32)},
            flops="93%",
        ),
    },
    maxxvit.AttentionCl: {
        "": grid(maxxvit.AttentionCl, tokens=True),
        "over heads": grid(maxxvit.AttentionCl, tokens=True, head_first=False),
        **{
            architecture: ModelCase(
                architecture,
                {"img_size": 64, "depths": (1, 1), "embed_dim": (32, 32), "stem_width": 16},
                flops="85%",
            )
            for architecture in ("maxvit_rmlp_pico_rw_256", "maxvit_tiny_tf_224", "maxxvitv2_nano_rw_256")
        },
    },
    levit.Attention: {
        "": LayerCase(lambda: levit.Attention(12, 4, 3, attn_ratio=2, resolution=4)),
        "convolutions": LayerCase(
            lambda: levit.Attention(12, 4, 3, attn_ratio=1.5, resolution=4, use_conv=True),
            tokens=False,
            fast=True,
        ),
        "model": ModelCase(
            "levit_128s",
            {
                "img_size": 96,  # of 64 a single token would be left, whose q and k do not matter
                "embed_dim": (16, 24, 32),
                "key_dim": 8,
                "num_heads": (2, 2, 2),
                "depth": (1, 1, 1),
            },
            flops="85%",
        ),
        "model, convolutions": ModelCase(
            "levit_conv_256d",
            {"img_size": 64, "embed_dim": (16, 24), "key_dim": 8, "num_heads": (2, 2), "depth": (1, 1)},
            flops="85%",
        ),
    },
    levit.AttentionDownsample: {
        "": LayerCase(lambda: levit.AttentionDownsample(12, 12, 4, 3, attn_ratio=2, resolution=4)),
        "convolutions": LayerCase(
            lambda: levit.AttentionDownsample(12, 12, 4, 2, resolution=4, use_conv=True, use_pool=True),
            tokens=False,
        ),
    },
    efficientformer.Attention: {
        "": LayerCase(lambda: efficientformer.Attention(12, 4, 3, attn_ratio=2, resolution=4)),
        "model": ModelCase(
            "efficientformer_l1", {"embed_dims": (8, 8, 16, 24), "depths": (1, 1, 1, 2)}, 224, flops="85%"
        ),
    },
    tiny_vit.Attention: {
        "": LayerCase(lambda: tiny_vit.Attention(12, 4, 3, attn_ratio=1, resolution=(4, 4))),
        "model": ModelCase(
            "tiny_vit_5m_224",
            {
                "embed_dims": (16, 32, 32, 32),
                "depths": (1, 1, 1, 1),
                "num_heads": (1, 2, 2, 2),
                "window_sizes": (2, 2, 2, 2),
            },
            64,
            flops="85%",
        ),
    },
    lowformer.ConvAttention: {
        "": LayerCase(
            lambda: lowformer.ConvAttention(60, 1.0, att_stride=2, att_kernel=5), dim=60, tokens=False
        ),
        "not coarser": LayerCase(
            lambda: lowformer.ConvAttention(12, att_stride=1, att_kernel=3), tokens=False
        ),
        "fused": LayerCase(
            lambda: lowformer.ConvAttention(60, 1.0, att_stride=1, att_kernel=3, fuse_out_proj=True),
            dim=60,
            tokens=False,
        ),
        "model": ModelCase(
            "lowformer_b0",
            {"width_list": (8, 8, 16, 32, 64), "depth_list": (0, 0, 0, 1, 1), "head_widths": (32, 32)},
            64,
            flops="99%",
        ),
    },
    cpubone.ConvAttention: {
        "": LayerCase(lambda: cpubone.ConvAttention(60, att_stride=2, att_kernel=5), dim=60, tokens=False),
        "fused": LayerCase(lambda: cpubone.ConvAttention(12, att_stride=2, fuse_out_proj=True), tokens=False),
        "nearest": LayerCase(
            lambda: cpubone.ConvAttention(12, att_stride=2, small_kernels=True, upsample_mode="nearest"),
            tokens=False,
            side=5,
        ),
        "not coarser": LayerCase(
            lambda: cpubone.ConvAttention(12, att_stride=1, small_kernels=True), tokens=False
        ),
        "nearest, fused": LayerCase(
            lambda: cpubone.ConvAttention(12, att_stride=2, upsample_mode="nearest", fuse_out_proj=True),
            tokens=False,
        ),
        "model": ModelCase(
            "cpubone_nano",
            {"width_list": (8, 8, 16, 32, 64), "depth_list": (0, 0, 0, 1, 1), "head_widths": (32, 32)},
            64,
            flops="95%",
        ),
    },
}
