"""Softmax attention of timm's ViTs and of models like them: all blocks at one resolution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.diff_attention import DiffAttention
from timm.layers.pos_embed_rel import RelPosBias
from timm.models import (
    beit,
    cait,
    convit,
    crossvit,
    eva,
    tnt,
    vision_transformer,
    vision_transformer_relpos,
    vision_transformer_sam,
    volo,
)
from torch import nn

from helpers.models import SMALL, LayerCase, ModelCase
from mhacut.adapters.softmax_special import OUTPUT_TOKENS
from mhacut.surgery.output_tokens import attend_from_output_tokens
from properties.cases import parts

Cases = dict[type[nn.Module], dict[str, LayerCase | ModelCase]]
NOTHING: Mapping[str, str] = MappingProxyType({})
TINY_VIT = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2, "mlp_ratio": 2}


def vit(
    architecture: str,
    *,
    whole: Mapping[str, str] = NOTHING,
    flops: str = "80%",
    fast: bool = False,
    **args: Any,
) -> ModelCase:
    small = {**SMALL, "depth": 1, "embed_dim": 96, **args}
    return ModelCase(architecture, small, whole=whole, flops=flops, fast=fast)


def deep(
    architecture: str,
    *,
    whole: Mapping[str, str] = NOTHING,
    flops: str = "80%",
    fast: bool = False,
    **args: Any,
) -> ModelCase:
    small = {"depth": 1, "img_size": 32, "embed_dim": 48, "num_heads": 3, **args}
    return ModelCase(architecture, small, whole=whole, flops=flops, fast=fast)


def sam(side: int, whole: Mapping[str, str] = NOTHING, **args: Any) -> ModelCase:
    small = {"depth": 1, "embed_dim": 48, "num_heads": 3, "window_size": 4, "neck_chans": 16}
    return ModelCase("samvit_base_patch16", {"img_size": side, **small, **args}, whole=whole)


def pooling(whole: Mapping[str, str] = NOTHING, dim_out: int | None = None, **args: Any) -> LayerCase:
    return LayerCase(
        lambda: AttentionPoolLatent(12, dim_out, num_heads=3, pool_type="", **args),
        out=dim_out,
        whole={**parts.POOLING_MLP, **whole},
    )


def first_read(
    read: int, whole: Mapping[str, str] = NOTHING, cls: type[nn.Module] = Attention, **args: Any
) -> LayerCase:
    def make() -> nn.Module:
        attention = cls(12, 3, **args)
        attend_from_output_tokens(attention, read)
        return attention

    return LayerCase(make, whole=whole, fast=not args)


def rope_read(cls: type[nn.Module], whole: Mapping[str, str] = NOTHING, **args: Any) -> LayerCase:
    """Two of 16 tokens, which have no position, are read."""
    table = torch.rand(14, 8, generator=torch.Generator().manual_seed(0))
    given = {"num_prefix_tokens": 2, "norm_layer": nn.LayerNorm, "scale_norm": False}
    return replace(first_read(2, whole, cls, **{**given, **args}), args=(table,), fast=not args)


CASES: Cases = {
    OUTPUT_TOKENS[Attention]: {
        "": first_read(1),
        "biases": first_read(2, qkv_bias=True),
        "gated": first_read(2, gated=True, qkv_bias=True),
        "normalised": first_read(2, parts.QK_NORMALISED, qk_norm=True, norm_layer=nn.LayerNorm),
    },
    OUTPUT_TOKENS[AttentionRope]: {
        "": rope_read(AttentionRope),
        "half": rope_read(AttentionRope, rotate_half=True, gated=True),
        "shared keys": rope_read(AttentionRope, parts.SHARED_KEYS, qkv_fused=False, num_kv_heads=1),
    },
    OUTPUT_TOKENS[eva.EvaAttention]: {
        "": rope_read(eva.EvaAttention),
        "separate": rope_read(eva.EvaAttention, qkv_fused=False, rotate_half=True),
        "no biases": rope_read(eva.EvaAttention, qkv_bias=False),
        "normalised": rope_read(eva.EvaAttention, parts.QK_NORMALISED, qk_norm=True),
    },
    OUTPUT_TOKENS[beit.Attention]: {
        "": first_read(1, cls=beit.Attention),
        "biases": first_read(1, cls=beit.Attention, window_size=(3, 5), qkv_bias=True),
    },
    OUTPUT_TOKENS[vision_transformer_relpos.RelPosAttention]: {
        "": first_read(1, cls=vision_transformer_relpos.RelPosAttention),
        "biases": first_read(
            1,
            cls=vision_transformer_relpos.RelPosAttention,
            qkv_bias=True,
            rel_pos_cls=partial(RelPosBias, window_size=(3, 5), prefix_tokens=1),
        ),
    },
    Attention: {
        "": vit("vit_tiny_patch16_224", depth=2, fast=True, flops="50%"),
        "distilled": vit("deit_tiny_distilled_patch16_224"),
        "layer scale": vit("deit3_small_patch16_224", num_heads=3, init_values=0.1),
        "registers": vit("vit_small_patch14_reg4_dinov2", img_size=42, num_heads=2),
        "pooling head": vit("vit_base_patch16_siglip_224", num_heads=3, whole=parts.POOLING_MLP, fast=True),
        "norm in front": vit("vit_base_patch16_clip_quickgelu_224", num_heads=4),
        "gated mlp": vit("vit_giant_patch14_reg4_dinov2", img_size=42, num_heads=4, fast=True),
        "no biases": vit("aimv2_large_patch14_224", img_size=42, num_heads=3, fast=True),
        "norms within": vit(
            "beit3_base_patch16_224", num_heads=4, whole=parts.NORMS_WITHIN, flops="95%", fast=True
        ),
        "normalised": vit("vit_tiny_patch16_224", qk_norm=True, whole=parts.QK_NORMALISED, fast=True),
        "vitamin": ModelCase("vitamin_small_224", {"img_size": 64, "depth": 1}, flops="85%"),
    },
    AttentionRope: {
        "interleaved": deep("vit_small_patch16_rope_224"),
        "mixed": deep("vit_small_patch16_rope_mixed_ape_224"),
        "half": deep("vit_small_patch16_rope_224", depth=2, rope_rotate_half=True, fast=True),
        "normalised": deep("vit_small_patch16_rope_224", qk_norm=True, whole=parts.QK_NORMALISED),
        "shared keys": deep(
            "vit_small_patch16_rope_224", qkv_fused=False, num_kv_heads=1, whole=parts.SHARED_KEYS
        ),
        "groups of heads": deep(
            "vit_small_patch16_rope_224",
            qkv_fused=False,
            num_heads=4,
            num_kv_heads=2,
            whole=parts.SHARED_KEYS,
        ),
        "pooling head": deep("vit_small_patch16_rope_224", global_pool="map", whole=parts.POOLING_MLP),
    },
    eva.EvaAttention: {
        "biases in parts": deep("eva02_tiny_patch14_224", img_size=42),
        "separate": deep("eva02_base_patch14_224", img_size=42, scale_mlp=False),
        "norms within": deep("eva02_base_patch16_clip_224", whole=parts.NORMS_WITHIN, flops="95%"),
        "half": deep("vit_small_patch16_dinov3"),
        "bias": deep("vit_small_patch16_dinov3_qkvb"),
    },
    beit.Attention: {
        "": deep("beit_base_patch16_224"),
        "shared positions": deep(
            "beit_base_patch16_224",
            depth=2,
            use_rel_pos_bias=False,
            use_shared_rel_pos_bias=True,
            init_values=None,
        ),
        "no biases": deep("beit_base_patch16_224", qkv_bias=False),
    },
    vision_transformer_relpos.RelPosAttention: {
        "mlp": deep("vit_relpos_small_patch16_224"),
        "bias": deep("vit_relpos_base_patch32_plus_rpn_256", img_size=64, rel_pos_type="bias", flops="90%"),
        "shared": deep("vit_srelpos_small_patch16_224", depth=2),
        "normalised": deep("vit_relpos_small_patch16_224", qk_norm=True, whole=parts.QK_NORMALISED),
    },
    vision_transformer_sam.Attention: {
        "": sam(96, depth=2, global_attn_indexes=(1,)),
        "no positions": sam(64, use_rel_pos=False),
        "turned": sam(
            64,
            {"qk": "q and k are rotated by their position"},
            use_rel_pos=False,
            use_rope=True,
            global_attn_indexes=(0,),
        ),
    },
    DiffAttention: {
        "": LayerCase(lambda: DiffAttention(12, 2, qkv_bias=True, depth=1), whole=parts.V_NORMALISED),
        "scalars": LayerCase(
            lambda: DiffAttention(12, 3, scale_norm=True, dual_lambda=True), whole=parts.V_NORMALISED
        ),
        "normalised": LayerCase(
            lambda: DiffAttention(12, 2, qk_norm=True), whole={**parts.QK_NORMALISED, **parts.V_NORMALISED}
        ),
        "model": ModelCase("vit_dwee_patch16_reg1_gap_256", TINY_VIT, whole=parts.V_NORMALISED, flops="85%"),
    },
    vision_transformer.ParallelScalingBlock: {
        "": LayerCase(lambda: vision_transformer.ParallelScalingBlock(12, 3, 2.0)),
        "biases": LayerCase(
            lambda: vision_transformer.ParallelScalingBlock(12, 3, 2.0, qkv_bias=True, init_values=0.5)
        ),
        "fused": LayerCase(
            lambda: vision_transformer.ParallelScalingBlock(
                12, 2, 2.0, qkv_bias=True, proj_bias=False, fuse_out_proj=True
            ),
            fast=True,
        ),
        "normalised": LayerCase(
            lambda: vision_transformer.ParallelScalingBlock(12, 3, 2.0, qk_norm=True),
            whole=parts.QK_NORMALISED,
        ),
        "model": ModelCase("vit_pwee_patch16_reg1_gap_256", TINY_VIT, flops="85%"),
        "model, normalised": ModelCase(
            "vit_base_patch16_xp_224", TINY_VIT, whole=parts.QK_NORMALISED, flops="85%"
        ),
    },
    vision_transformer.DiffParallelScalingBlock: {
        "": LayerCase(
            lambda: vision_transformer.DiffParallelScalingBlock(12, 2, 2.0, init_values=0.5),
            whole=parts.V_NORMALISED,
            fast=True,
        ),
        "biases": LayerCase(
            lambda: vision_transformer.DiffParallelScalingBlock(12, 2, 2.0, qkv_bias=True, dual_lambda=True),
            whole=parts.V_NORMALISED,
        ),
        "model": ModelCase("vit_dpwee_patch16_reg1_gap_256", TINY_VIT, whole=parts.V_NORMALISED, flops="85%"),
    },
    AttentionPoolLatent: {
        "": pooling(norm_layer=nn.LayerNorm, latent_len=4),
        "positions": pooling(dim_out=20, latent_len=2, latent_dim=8, pos_embed="abs", feat_size=16),
        "normalised": pooling(parts.QK_NORMALISED, qk_norm=True, qkv_bias=False),
        "normalised, biases": pooling(parts.QK_NORMALISED, qk_norm=True),
        "behind a vit": deep("vit_base_patch16_siglip_224", whole=parts.POOLING_MLP),
    },
    cait.TalkingHeadAttn: {
        "": deep("cait_xxs24_224", embed_dim=48, num_heads=4, depth_token_only=0, global_pool="avg")
    },
    cait.ClassAttn: {
        "": LayerCase(lambda: cait.ClassAttn(12, 3)),
        "biases": LayerCase(lambda: cait.ClassAttn(12, 2, qkv_bias=True)),
    },
    volo.ClassAttention: {"": LayerCase(lambda: volo.ClassAttention(12, 3, qkv_bias=True))},
    crossvit.CrossAttention: {
        "": LayerCase(lambda: crossvit.CrossAttention(12, 3, qkv_bias=True), fast=True),
        "model": ModelCase(
            "crossvit_9_dagger_240",
            {
                "img_size": 120,
                "embed_dim": (16, 24),
                "depth": ((1, 1, 0),),
                "num_heads": (2, 2),
                "mlp_ratio": (2.0, 2.0, 1.0),
            },
            flops="85%",
        ),
    },
    tnt.Attention: {
        "": LayerCase(lambda: tnt.Attention(12, 12, 3)),
        "narrow": LayerCase(lambda: tnt.Attention(12, 8, 2, qkv_bias=True)),
        "model": ModelCase(
            "tnt_s_patch16_224",
            {
                "img_size": 32,
                "depth": 1,
                "embed_dim": 32,
                "inner_dim": 8,
                "num_heads_inner": 2,
                "num_heads_outer": 2,
            },
            flops="85%",
        ),
    },
    convit.MHSA: {
        "": ModelCase(
            "convit_tiny",
            {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 4, "local_up_to_layer": 0},
        )
    },
    convit.GPSA: {
        "": LayerCase(lambda: convit.GPSA(12, 3, qkv_bias=True)),
        "model": ModelCase(
            "convit_tiny",
            {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 4, "local_up_to_layer": 2},
            flops="85%",
        ),
    },
}
