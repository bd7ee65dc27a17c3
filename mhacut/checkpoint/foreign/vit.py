"""ViT, DeiT and BEiT of transformers."""

from __future__ import annotations

from typing import Any

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
"""Sizes in timm's names, by width, depth and heads."""
EMBEDDINGS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
}
BLOCK = {
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
"""Names in files that transformers writes, then those of its modules from version 5 on."""
_UNUSED = {
    "pooler": "the pooler",
    "embeddings.mask_token": "",
    "decoder": "the decoder of the pretraining",
    "lm_head": "the head of the pretraining",
}


def vit_name(size: str | None, patch: int, side: int, suffix: str = "") -> str:
    """Return the name of timm's ViT of this size, for images of ``side`` pixels or else of 224.

    Args:
        size: size in timm's names; None if it has none.
        patch: side of a patch in pixels.
        side: side of the images in pixels.
        suffix: part of the name behind the patch, ``_clip``.

    Returns:
        The name; that of ViT-B/16 for images of 224 if timm has neither.
    """
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
    """Return the size in timm's name for a ViT of this width, depth and heads, ``base``; None without one."""
    return SIZES.get((args["embed_dim"], args["depth"], args["num_heads"]))


def _vit_renaming(shapes: Shapes) -> Renaming:
    names = {
        **EMBEDDINGS,
        "embeddings.distillation_token": "reg_token",
        **BLOCK,
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
        **EMBEDDINGS,
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
        **BLOCK,
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
    name = f"beit_{size_name(args)}_patch{args['patch_size']}_{args['img_size']}"
    return Built(name if known_model(name) else "beit_base_patch16_224", args)


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
