"""ViT, DeiT, BEiT, DINOv2 and DINOv3 of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mhacut.checkpoint.build import known_model
from mhacut.checkpoint.foreign.config import Config
from mhacut.checkpoint.foreign.family import Built, Family, Shapes, activation, check_eps, mlp_ratio
from mhacut.checkpoint.foreign.rename import Renaming

SIZES = {
    (192, 12, 3): "tiny",
    (384, 12, 6): "small",
    (768, 12, 12): "base",
    (1024, 24, 16): "large",
    (1280, 32, 16): "huge",
}
"""Names of timm by width, depth and heads."""
_EMBEDDINGS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
}
_BLOCK = {
    "encoder.layer.*.attention.attention.query": "blocks.*.attn.qkv#0",
    "encoder.layer.*.attention.attention.key": "blocks.*.attn.qkv#1",
    "encoder.layer.*.attention.attention.value": "blocks.*.attn.qkv#2",
    "encoder.layer.*.attention.output.dense": "blocks.*.attn.proj",
    "encoder.layer.*.layernorm_before": "blocks.*.norm1",
    "encoder.layer.*.layernorm_after": "blocks.*.norm2",
    "encoder.layer.*.intermediate.dense": "blocks.*.mlp.fc1",
    "encoder.layer.*.output.dense": "blocks.*.mlp.fc2",
    "layers.*.attention.q_proj": "blocks.*.attn.qkv#0",
    "layers.*.attention.k_proj": "blocks.*.attn.qkv#1",
    "layers.*.attention.v_proj": "blocks.*.attn.qkv#2",
    "layers.*.attention.o_proj": "blocks.*.attn.proj",
    "layers.*.layernorm_before": "blocks.*.norm1",
    "layers.*.layernorm_after": "blocks.*.norm2",
    "layers.*.mlp.fc1": "blocks.*.mlp.fc1",
    "layers.*.mlp.fc2": "blocks.*.mlp.fc2",
}
"""Names in files that transformers writes, then those of its modules since version 5."""
_DINOV2_CLASSIFIER = (
    "the classifier of DINOv2 reads the class token and the mean of the patches side by side, "
    "which no model of timm does"
)
_UNUSED = {
    "pooler": "the pooler",
    "embeddings.mask_token": "",
    "decoder": "the decoder of the pretraining",
    "lm_head": "the head of the pretraining",
}


def vit_name(size: str | None, patch: int, side: int, suffix: str = "") -> str:
    """Return timm's name of a ViT of this size, of the nearest image size it has one for."""
    for name in (f"vit_{size}_patch{patch}{suffix}_{side}", f"vit_{size}_patch{patch}{suffix}_224"):
        if size is not None and known_model(name):
            return name
    return f"vit_base_patch16{suffix}_224"


def vit_args(config: Config, act: str = "gelu", patch: int = 16) -> dict[str, Any]:
    """Return the arguments of timm's ``VisionTransformer`` that configurations of ViTs share."""
    width = config.size("hidden_size", 768)
    args: dict[str, Any] = {
        "img_size": config.side("image_size", 224),
        "patch_size": config.side("patch_size", patch),
        "in_chans": config.size("num_channels", 3),
        "embed_dim": width,
        "depth": config.size("num_hidden_layers", 12),
        "num_heads": config.size("num_attention_heads", 12),
        "mlp_ratio": mlp_ratio(config.size("intermediate_size", 3072), width),
    }
    stated = activation(config, default=act)
    return args if stated == "gelu" else {**args, "act_layer": stated}


def size_name(args: dict[str, Any]) -> str | None:
    """Return timm's word for a ViT's width, depth and heads, ``base``, if it has one."""
    return SIZES.get((args["embed_dim"], args["depth"], args["num_heads"]))


def _vit_renaming(shapes: Shapes) -> Renaming:
    names = {
        **_EMBEDDINGS,
        "embeddings.distillation_token": "reg_token",
        **_BLOCK,
        "layernorm": "norm",
        "classifier": "head",
        "cls_classifier": "head",
        "distillation_classifier": "head_dist",
    }
    if "distillation_classifier.weight" in shapes:
        names["embeddings.distillation_token"] = "dist_token"
    return Renaming(names, _UNUSED, prefixes=("vit.", "deit."))


def _build_vit(config: Config, shapes: Shapes) -> Built:
    args = {**vit_args(config), "qkv_bias": config.flag("qkv_bias", True)}
    name = vit_name(size_name(args), args["patch_size"], args["img_size"])
    eps = config.number("layer_norm_eps", 1e-12)
    if eps > 5e-6:  # the ViTs of timm whose norms add 1e-5 are those of CLIP
        check_eps(config, 1e-5, 1e-12)
        name, args["pre_norm"] = "vit_base_patch16_clip_224", False
    if "dist_token" in shapes:
        check_eps(config, 1e-6, 1e-12)
        return Built("deit_base_distilled_patch16_224", args)
    if "reg_token" in shapes:  # a distillation token that no classifier reads
        args["reg_tokens"] = 1
    return Built(name, args)


VIT = Family(
    "ViT of transformers",
    (
        ("encoder.layer.0.layernorm_before.weight", "embeddings.cls_token"),
        ("layers.0.layernorm_before.weight", "embeddings.cls_token"),
    ),
    _vit_renaming,
    _build_vit,
    model_types=("vit", "deit", "vit_msn", "vit_mae"),
    unlike=("lambda_1",),
)


def _beit_renaming(shapes: Shapes) -> Renaming:
    names = {
        **_EMBEDDINGS,
        "encoder.layer.*.attention.attention.query.bias": "blocks.*.attn.q_bias",
        "encoder.layer.*.attention.attention.value.bias": "blocks.*.attn.v_bias",
        "encoder.layer.*.attention.attention.relative_position_bias.relative_position_bias_table": (
            "blocks.*.attn.relative_position_bias_table"
        ),
        "encoder.layer.*.lambda_1": "blocks.*.gamma_1",
        "encoder.layer.*.lambda_2": "blocks.*.gamma_2",
        "layers.*.attention.q_proj.bias": "blocks.*.attn.q_bias",
        "layers.*.attention.v_proj.bias": "blocks.*.attn.v_bias",
        "layers.*.relative_position_bias.relative_position_bias_table": (
            "blocks.*.attn.relative_position_bias_table"
        ),
        "layers.*.lambda_1": "blocks.*.gamma_1",
        "layers.*.lambda_2": "blocks.*.gamma_2",
        **_BLOCK,
        "encoder.relative_position_bias.relative_position_bias_table": (
            "rel_pos_bias.relative_position_bias_table"
        ),
        "shared_position_bias.relative_position_bias_table": "rel_pos_bias.relative_position_bias_table",
        "pooler.layernorm": "fc_norm",
        "layernorm": "norm",
        "classifier": "head",
    }
    left_out = {
        "embeddings.mask_token": "",
        "lm_head": "the head of the pretraining",
        "encoder.layer.*.attention.attention.relative_position_bias.relative_position_index": "",
        "encoder.relative_position_bias.relative_position_index": "",
    }
    return Renaming(names, left_out, prefixes=("beit.", "data2vec_vision."))


def _build_beit(config: Config, shapes: Shapes) -> Built:
    config.require("hidden_act", "gelu", reason="timm's BEiT has GELU")
    check_eps(config, 1e-6, 1e-12)
    mean_pooling = config.flag("use_mean_pooling", True)
    args = {
        **vit_args(config),
        "use_abs_pos_emb": config.flag("use_absolute_position_embeddings", False),
        "use_rel_pos_bias": config.flag("use_relative_position_bias", False),
        "use_shared_rel_pos_bias": config.flag("use_shared_relative_position_bias", False),
        "init_values": config.number("layer_scale_init_value", 0.1) or None,
        "global_pool": "avg" if mean_pooling else "token",
        "use_fc_norm": "fc_norm.weight" in shapes,
    }
    size = size_name(args)
    name = f"beit_{size}_patch{args['patch_size']}_{args['img_size']}"
    return Built(name if size and known_model(name) else "beit_base_patch16_224", args)


BEIT = Family(
    "BEiT of transformers",
    (
        ("encoder.layer.0.lambda_1", "encoder.layer.0.layernorm_before.weight"),
        ("layers.0.lambda_1", "layers.0.layernorm_before.weight"),
    ),
    _beit_renaming,
    _build_beit,
    model_types=("beit", "data2vec-vision"),
)


def _dinov2_renaming(shapes: Shapes) -> Renaming:
    names = {
        **_EMBEDDINGS,
        "embeddings.register_tokens": "reg_token",
        **{name: target for name, target in _BLOCK.items() if ".attention." in name},
        "encoder.layer.*.attention.q_proj": "blocks.*.attn.qkv#0",
        "encoder.layer.*.attention.k_proj": "blocks.*.attn.qkv#1",
        "encoder.layer.*.attention.v_proj": "blocks.*.attn.qkv#2",
        "encoder.layer.*.attention.o_proj": "blocks.*.attn.proj",
        "encoder.layer.*.norm1": "blocks.*.norm1",
        "encoder.layer.*.norm2": "blocks.*.norm2",
        "encoder.layer.*.layer_scale1.lambda1": "blocks.*.ls1.gamma",
        "encoder.layer.*.layer_scale2.lambda1": "blocks.*.ls2.gamma",
        "encoder.layer.*.mlp.weights_in": "blocks.*.mlp.fc1",
        "encoder.layer.*.mlp.weights_out": "blocks.*.mlp.fc2",
        "encoder.layer.*.mlp.gate_proj": "blocks.*.mlp.fc1#0",
        "encoder.layer.*.mlp.up_proj": "blocks.*.mlp.fc1#1",
        "encoder.layer.*.mlp.down_proj": "blocks.*.mlp.fc2",
        "encoder.layer.*.mlp": "blocks.*.mlp",
        "layernorm": "norm",
    }
    return Renaming(
        names,
        {"embeddings.mask_token": ""},
        {"classifier": _DINOV2_CLASSIFIER},
        prefixes=("dinov2.", "dinov2_with_registers."),
        finish=_place_registers,
    )


def _place_registers(tensors: dict[str, Tensor]) -> None:
    """Give registers the position zero: timm adds positions after it puts them behind the class token."""
    registers = tensors.get("reg_token")
    if registers is not None:
        positions = tensors["pos_embed"]
        none = torch.zeros_like(registers, dtype=positions.dtype)
        tensors["pos_embed"] = torch.cat([positions[:, :1], none, positions[:, 1:]], dim=1)


def _build_dinov2(config: Config, shapes: Shapes) -> Built:
    check_eps(config, 1e-6, 1e-6)
    width = config.size("hidden_size", 768)
    hidden = int(width * config.number("mlp_ratio", 4))
    gated = config.flag("use_swiglu_ffn", False)
    with_registers = config.raw("model_type") == "dinov2_with_registers"
    args = vit_args(config, patch=16 if with_registers else 14)
    args |= {
        "mlp_ratio": mlp_ratio(hidden, width),
        "qkv_bias": config.flag("qkv_bias", True),
        "init_values": 1e-5,
    }
    registers = shapes.get("reg_token", (0, 0, 0))[1]
    if registers:
        args |= {"reg_tokens": registers, "no_embed_class": False}
    if gated:
        args["mlp_ratio"] = mlp_ratio(2 * _gated_channels(hidden), width)
        args.pop("act_layer", None)  # always SiLU
        size: str | None = "giant"
    else:
        size = size_name(args)
    name = f"vit_{size or 'base'}_patch14_{'reg4_' if registers else ''}dinov2"
    return Built(name, args)


def _gated_channels(hidden: int) -> int:
    """Return the hidden channels of DINOv2's gated MLP: two thirds, a multiple of 8."""
    return (int(hidden * 2 / 3) + 7) // 8 * 8


DINOV2 = Family(
    "DINOv2 of transformers",
    (
        ("encoder.layer.0.layer_scale1.lambda1", "encoder.layer.0.attention.attention.query.weight"),
        ("encoder.layer.0.layer_scale1.lambda1", "encoder.layer.0.attention.q_proj.weight"),
    ),
    _dinov2_renaming,
    _build_dinov2,
    model_types=("dinov2", "dinov2_with_registers"),
)


def _dinov3_renaming(shapes: Shapes) -> Renaming:
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.register_tokens": "reg_token",
        "embeddings.patch_embeddings": "patch_embed.proj",
        "*.attention.q_proj.bias": "blocks.*.attn.q_bias",
        "*.attention.v_proj.bias": "blocks.*.attn.v_bias",
        "*.attention.q_proj": "blocks.*.attn.qkv#0",
        "*.attention.k_proj": "blocks.*.attn.qkv#1",
        "*.attention.v_proj": "blocks.*.attn.qkv#2",
        "*.attention.o_proj": "blocks.*.attn.proj",
        "*.norm1": "blocks.*.norm1",
        "*.norm2": "blocks.*.norm2",
        "*.layer_scale1.lambda1": "blocks.*.gamma_1",
        "*.layer_scale2.lambda1": "blocks.*.gamma_2",
        "*.mlp.gate_proj": "blocks.*.mlp.fc1_g",
        "*.mlp.up_proj": "blocks.*.mlp.fc1_x",
        "*.mlp.down_proj": "blocks.*.mlp.fc2",
        "norm": "norm",
        "classifier": "head",
    }
    if not any(name.endswith("mlp.gate_proj.weight") for name in shapes):
        names["*.mlp.up_proj"] = "blocks.*.mlp.fc1"
    left_out = {"embeddings.mask_token": ""}
    if any(name.endswith("register_tokens") and shape[1:2] == (0,) for name, shape in shapes.items()):
        left_out["embeddings.register_tokens"] = ""
    prefixes = ("dinov3_vit.model.layer.", "dinov3_vit.layer.", "model.layer.", "layer.")
    return Renaming(names, left_out, prefixes=(*prefixes, "dinov3_vit.", "model."))


def _build_dinov3(config: Config, shapes: Shapes) -> Built:
    check_eps(config, 1e-5, 1e-5)
    width, heads = config.size("hidden_size", 384), config.size("num_attention_heads", 6)
    config.require("key_bias", False, reason="timm's DINOv3 has none")
    gated = config.flag("use_gated_mlp", False)
    config.require("hidden_act", "silu" if gated else "gelu", reason="timm's DINOv3 has GELU, or SiLU gates")
    bias = config.flag("query_bias", True)
    config.require("value_bias", bias, reason="timm's DINOv3 has biases of queries and values, or neither")
    config.require("proj_bias", True, reason="timm's DINOv3 has it")
    config.require("mlp_bias", True, reason="timm's DINOv3 has it")
    args = {
        "img_size": config.side("image_size", 224),
        "patch_size": config.side("patch_size", 16),
        "in_chans": config.size("num_channels", 3),
        "embed_dim": width,
        "depth": config.size("num_hidden_layers", 12),
        "num_heads": heads,
        "mlp_ratio": mlp_ratio(config.size("intermediate_size", 1536), width),
        "qkv_bias": bias,
        "num_reg_tokens": config.size("num_register_tokens", 0, least=0),
        "rope_temperature": config.number("rope_theta", 100.0),
        "global_pool": "token",
        "swiglu_mlp": gated,
    }
    if gated:
        args["swiglu_align_to"] = 1  # gate and value are matrices of their own
    size = size_name(args) or "base"
    name = f"vit_{size}_patch16_dinov3{'_qkvb' if bias else ''}"
    return Built(name if known_model(name) else "vit_base_patch16_dinov3", args)


DINOV3 = Family(
    "DINOv3 of transformers",
    (("layer.0.attention.q_proj.weight", "layer.0.layer_scale1.lambda1"),),
    _dinov3_renaming,
    _build_dinov3,
    model_types=("dinov3_vit",),
)
