"""Vision transformers of transformers: ViT, DeiT, BEiT, DINOv2, DINOv3, CLIP, SigLIP, Swin and Swin V2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mhacut.checkpoint.foreign.config import Config
from mhacut.checkpoint.foreign.family import (
    ACTIVATIONS,
    Built,
    Family,
    Names,
    Shapes,
    mlp_ratio,
    move,
    timm_name,
    vit_name,
    vit_size,
)
from mhacut.errors import CheckpointError

_VIT_ARGS: dict[str, tuple[str, Any]] = {
    "img_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "in_chans": ("num_channels", 3),
    "embed_dim": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
}
"""Arguments of timm's ViTs, as the configurations name them, and what holds where they do not."""
_EMBEDDINGS: Names = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
}


def _separate(source: str, target: str, parts: Sequence[str] = ("query", "key", "value")) -> Names:
    """Return the names of queries, keys and values, which timm joins to one matrix."""
    return {f"{source}.{part}": f"{target}#{number}" for number, part in enumerate(parts)}


_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_QKV = "blocks.*.attn.qkv"
_BLOCK: Names = {
    **_separate("encoder.layer.*.attention.attention", _QKV),
    "encoder.layer.*.attention.output.dense": "blocks.*.attn.proj",
    "encoder.layer.*.layernorm_before": "blocks.*.norm1",
    "encoder.layer.*.layernorm_after": "blocks.*.norm2",
    "encoder.layer.*.intermediate.dense": "blocks.*.mlp.fc1",
    "encoder.layer.*.output.dense": "blocks.*.mlp.fc2",
    **_separate("layers.*.attention", _QKV, _PROJECTIONS),
    "layers.*.attention.o_proj": "blocks.*.attn.proj",
    "layers.*.layernorm_before": "blocks.*.norm1",
    "layers.*.layernorm_after": "blocks.*.norm2",
    "layers.*.mlp": "blocks.*.mlp",
}
"""Names in files that transformers writes, then those of its modules from version 5 on."""


def _vit_args(config: Config, act: str = "gelu", patch: int = 16) -> dict[str, Any]:
    """Return the arguments of timm's ``VisionTransformer`` that configurations of ViTs share."""
    args = config.read({**_VIT_ARGS, "patch_size": ("patch_size", patch)})
    args["mlp_ratio"] = mlp_ratio(config.get("intermediate_size", 3072), args["embed_dim"])
    stated = config.get("hidden_act", act)
    if stated not in ACTIVATIONS:
        raise config.fault("hidden_act", f"one of {', '.join(ACTIVATIONS)}")
    return args if stated == "gelu" else {**args, "act_layer": ACTIVATIONS[stated]}


def _finish_vit(tensors: dict[str, Tensor]) -> None:
    """Make a register of a distillation token that no classifier reads."""
    if "head_dist.weight" not in tensors:
        move(tensors, "dist_token", "reg_token")


def _build_vit(config: Config, shapes: Shapes) -> Built:
    args = {**_vit_args(config), "qkv_bias": config.get("qkv_bias", True)}
    name = vit_name(args)
    if config.get("layer_norm_eps", 1e-12) > 5e-6:  # the ViTs of timm whose norms add 1e-5 are those of CLIP
        config.require_eps(1e-5, 1e-12)
        name, args["pre_norm"] = "vit_base_patch16_clip_224", False
    if "dist_token" in shapes:
        config.require_eps(1e-6, 1e-12)
        return Built("deit_base_distilled_patch16_224", args)
    if "reg_token" in shapes:
        args["reg_tokens"] = 1
    return Built(name, args)


VIT = Family(
    "ViT of transformers",
    {
        **_EMBEDDINGS,
        "embeddings.distillation_token": "dist_token",
        **_BLOCK,
        "layernorm": "norm",
        "classifier": "head",
        "cls_classifier": "head",
        "distillation_classifier": "head_dist",
    },
    signs=(
        ("encoder.layer.0.layernorm_before.weight", "embeddings.cls_token"),
        ("layers.0.layernorm_before.weight", "embeddings.cls_token"),
    ),
    unlike=("lambda_1",),
    prefixes=("vit.", "deit."),
    left_out={
        "pooler": "the pooler",
        "embeddings.mask_token": "",
        "decoder": "the decoder of the pretraining",
        "lm_head": "the head of the pretraining",
    },
    finish=_finish_vit,
    model_types=("vit", "deit", "vit_msn", "vit_mae"),
    build=_build_vit,
)


def _build_beit(config: Config, shapes: Shapes) -> Built:
    config.require({"hidden_act": "gelu"}, "timm's BEiT has GELU")
    config.require_eps(1e-6, 1e-12)
    args = {
        **_vit_args(config),
        "use_abs_pos_emb": config.get("use_absolute_position_embeddings", False),
        "use_rel_pos_bias": config.get("use_relative_position_bias", False),
        "use_shared_rel_pos_bias": config.get("use_shared_relative_position_bias", False),
        "init_values": config.get("layer_scale_init_value", 0.1) or None,
        "global_pool": "avg" if config.get("use_mean_pooling", True) else "token",
        "use_fc_norm": "fc_norm.weight" in shapes,
    }
    patterns = ("beit_{size}_patch{patch_size}_{img_size}", "beit_base_patch16_224")
    return Built(timm_name(patterns, args, size=vit_size(args)), args)


_POSITION_BIAS = "relative_position_bias.relative_position_bias_table"
BEIT = Family(
    "BEiT of transformers",
    {
        **_EMBEDDINGS,
        "encoder.layer.*.attention.attention.query.bias": "blocks.*.attn.q_bias",
        "encoder.layer.*.attention.attention.value.bias": "blocks.*.attn.v_bias",
        f"encoder.layer.*.attention.attention.{_POSITION_BIAS}": "blocks.*.attn.relative_position_bias_table",
        "encoder.layer.*.lambda_1": "blocks.*.gamma_1",
        "encoder.layer.*.lambda_2": "blocks.*.gamma_2",
        "layers.*.attention.q_proj.bias": "blocks.*.attn.q_bias",
        "layers.*.attention.v_proj.bias": "blocks.*.attn.v_bias",
        f"layers.*.{_POSITION_BIAS}": "blocks.*.attn.relative_position_bias_table",
        "layers.*.lambda_1": "blocks.*.gamma_1",
        "layers.*.lambda_2": "blocks.*.gamma_2",
        **_BLOCK,
        f"encoder.{_POSITION_BIAS}": "rel_pos_bias.relative_position_bias_table",
        "shared_position_bias.relative_position_bias_table": "rel_pos_bias.relative_position_bias_table",
        "pooler.layernorm": "fc_norm",
        "layernorm": "norm",
        "classifier": "head",
    },
    signs=(
        ("encoder.layer.0.lambda_1", "encoder.layer.0.layernorm_before.weight"),
        ("layers.0.lambda_1", "layers.0.layernorm_before.weight"),
    ),
    prefixes=("beit.", "data2vec_vision."),
    left_out={"embeddings.mask_token": "", "lm_head": "the head of the pretraining"},
    model_types=("beit", "data2vec-vision"),
    build=_build_beit,
)


def _finish_dinov2(tensors: dict[str, Tensor]) -> None:
    """Give registers positions of zeros: timm puts them behind the class token before it adds positions."""
    registers = tensors.get("reg_token")
    if registers is not None:
        positions = tensors["pos_embed"]
        none = torch.zeros_like(registers, dtype=positions.dtype)
        tensors["pos_embed"] = torch.cat([positions[:, :1], none, positions[:, 1:]], dim=1)


def _build_dinov2(config: Config, shapes: Shapes) -> Built:
    config.require_eps(1e-6, 1e-6)
    args = _vit_args(config, patch=16 if config.raw("model_type") == "dinov2_with_registers" else 14)
    width = args["embed_dim"]
    hidden = int(width * config.get("mlp_ratio", 4.0))
    args |= {
        "mlp_ratio": mlp_ratio(hidden, width),
        "qkv_bias": config.get("qkv_bias", True),
        "init_values": 1e-5,
    }
    size = vit_size(args)
    registers = shapes.get("reg_token", (0, 0, 0))[1]
    if registers:
        args |= {"reg_tokens": registers, "no_embed_class": False}
    if config.get("use_swiglu_ffn", False):
        # Two thirds of the channels, a multiple of 8; timm counts gates and values together.
        gated = (int(hidden * 2 / 3) + 7) // 8 * 8
        args["mlp_ratio"], size = mlp_ratio(2 * gated, width), "giant"
        args.pop("act_layer", None)  # always SiLU
    ending = f"patch14_{'reg4_' if registers else ''}dinov2"
    return Built(timm_name(("vit_{size}_" + ending, f"vit_base_{ending}"), args, size=size), args)


DINOV2 = Family(
    "DINOv2 of transformers",
    {
        **_EMBEDDINGS,
        "embeddings.register_tokens": "reg_token",
        **{name: target for name, target in _BLOCK.items() if ".attention." in name},
        **_separate("encoder.layer.*.attention", _QKV, _PROJECTIONS),
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
    },
    signs=(
        ("encoder.layer.0.layer_scale1.lambda1", "encoder.layer.0.attention.attention.query.weight"),
        ("encoder.layer.0.layer_scale1.lambda1", "encoder.layer.0.attention.q_proj.weight"),
    ),
    prefixes=("dinov2.", "dinov2_with_registers."),
    left_out={"embeddings.mask_token": ""},
    refused={
        "classifier": "the classifier of DINOv2 reads the class token and the mean of the patches side by "
        "side, which no model of timm does"
    },
    finish=_finish_dinov2,
    model_types=("dinov2", "dinov2_with_registers"),
    build=_build_dinov2,
)


def _finish_dinov3(tensors: dict[str, Tensor]) -> None:
    """Name the only matrix of an MLP without gates; drop a table of no registers."""
    if not any(name.endswith(".mlp.fc1_g.weight") for name in tensors):
        for name in [name for name in tensors if ".mlp.fc1_x." in name]:
            tensors[name.replace("fc1_x", "fc1")] = tensors.pop(name)
    if "reg_token" in tensors and not tensors["reg_token"].shape[1]:
        del tensors["reg_token"]


def _build_dinov3(config: Config, shapes: Shapes) -> Built:
    config.require_eps(1e-5, 1e-5)
    gated, bias = config.get("use_gated_mlp", False), config.get("query_bias", True)
    config.require({"hidden_act": "silu" if gated else "gelu"}, "timm's DINOv3 has GELU, or SiLU gates")
    fixed = {"key_bias": False, "value_bias": bias, "proj_bias": True, "mlp_bias": True}
    config.require(fixed, "timm's DINOv3 has one value only")
    args = config.read(
        {
            **_VIT_ARGS,
            "embed_dim": ("hidden_size", 384),
            "num_heads": ("num_attention_heads", 6),
            "num_reg_tokens": ("num_register_tokens", 0),
            "rope_temperature": ("rope_theta", 100.0),
        }
    )
    args |= {
        "mlp_ratio": mlp_ratio(config.get("intermediate_size", 1536), args["embed_dim"]),
        "qkv_bias": bias,
        "global_pool": "token",
        "swiglu_mlp": gated,
    }
    if gated:
        args["swiglu_align_to"] = 1  # timm then keeps gate and value in separate matrices, as the file does
    patterns = ("vit_{size}_patch16_dinov3" + ("_qkvb" if bias else ""), "vit_base_patch16_dinov3")
    return Built(timm_name(patterns, args, size=vit_size(args) or "base"), args)


DINOV3 = Family(
    "DINOv3 of transformers",
    {
        "embeddings.cls_token": "cls_token",
        "embeddings.register_tokens": "reg_token",
        "embeddings.patch_embeddings": "patch_embed.proj",
        "*.attention.q_proj.bias": "blocks.*.attn.q_bias",
        "*.attention.v_proj.bias": "blocks.*.attn.v_bias",
        **_separate("*.attention", _QKV, _PROJECTIONS),
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
    },
    signs=(("layer.0.attention.q_proj.weight", "layer.0.layer_scale1.lambda1"),),
    prefixes=(
        *("dinov3_vit.model.layer.", "dinov3_vit.layer.", "model.layer.", "layer."),
        *("dinov3_vit.", "model."),
    ),
    left_out={"embeddings.mask_token": ""},
    finish=_finish_dinov3,
    model_types=("dinov3_vit",),
    build=_build_dinov3,
)

_TOWER: Names = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.patch_embedding": "patch_embed.proj",
    "embeddings.position_embedding.weight": "pos_embed",
    "pre_layrnorm": "norm_pre",
    "encoder.layers.*.layer_norm1": "blocks.*.norm1",
    "encoder.layers.*.layer_norm2": "blocks.*.norm2",
    **_separate("encoder.layers.*.self_attn", _QKV, _PROJECTIONS),
    "encoder.layers.*.self_attn.out_proj": "blocks.*.attn.proj",
    "encoder.layers.*.mlp": "blocks.*.mlp",
    "post_layernorm": "norm",
    "classifier": "head",
}
_NOT_THE_TOWER = {
    "text_model": "the text tower",
    "text_projection": "the text tower",
    "logit_scale": "",
    "logit_bias": "",
}


def finish_clip(tensors: dict[str, Tensor]) -> None:
    """Reshape class token and positions as timm has them, in place; give a projection a bias of zeros."""
    tensors["cls_token"] = tensors["cls_token"].reshape(1, 1, -1)
    tensors["pos_embed"] = tensors["pos_embed"].unsqueeze(0)
    head = tensors.get("head.weight")
    if head is not None and "head.bias" not in tensors:
        tensors["head.bias"] = torch.zeros(head.shape[0], dtype=head.dtype, device=head.device)


def _finish_clip(tensors: dict[str, Tensor]) -> None:
    """Drop the last norm and the projection if there is a classifier, which reads neither."""
    classified = "head.weight" in tensors
    move(tensors, "projection.", None if classified else "head.")
    if classified:
        move(tensors, "norm.", None)
    finish_clip(tensors)


def _build_clip(config: Config, shapes: Shapes) -> Built:
    config.require_eps(1e-5, 1e-5)
    args = _vit_args(config, "quick_gelu", patch=32)
    if "norm.weight" not in shapes:
        args |= {"global_pool": "avg", "final_norm": False}
    suffix = "_clip_quickgelu" if args.get("act_layer") == "quick_gelu" else "_clip"
    args.setdefault("act_layer", "gelu")
    return Built(vit_name(args, suffix), args)


CLIP = Family(
    "image tower of CLIP of transformers",
    {**_TOWER, "visual_projection": "projection"},
    signs=(("pre_layrnorm.weight", "encoder.layers.0.self_attn.q_proj.weight"),),
    prefixes=("vision_model.",),
    left_out=_NOT_THE_TOWER,
    finish=_finish_clip,
    model_types=("clip", "clip_vision_model"),
    build=_build_clip,
)


def _finish_siglip(tensors: dict[str, Tensor]) -> None:
    """Make a convolution of SigLIP 2's linear patch embedding; drop pooling that the classifier skips."""
    if "head.weight" in tensors:
        move(tensors, "attn_pool.", None)
    tensors["pos_embed"] = tensors["pos_embed"].unsqueeze(0)
    patches = tensors["patch_embed.proj.weight"]
    if patches.dim() == 2:  # (D, patch * patch * 3)
        side = math.isqrt(patches.shape[1] // 3)
        square = patches.reshape(patches.shape[0], side, side, 3)
        tensors["patch_embed.proj.weight"] = square.permute(0, 3, 1, 2).contiguous()


def _build_siglip(config: Config, shapes: Shapes) -> Built:
    config.require_eps(1e-6, 1e-6)
    args = _vit_args(config, "gelu_pytorch_tanh")
    if len(shapes.get("pos_embed", ())) == 3 and "image_size" not in config:
        patches = shapes["pos_embed"][1]  # SigLIP 2 takes images of any aspect ratio; here, the square
        side = math.isqrt(patches)
        if side * side != patches or args["in_chans"] != 3:
            raise CheckpointError(
                f"{config.where}: expected a square grid of patches and images of 3 channels, found "
                f"{patches} patches and {args['in_chans']} channels"
            )
        args["img_size"] = side * args["patch_size"]
    args.setdefault("act_layer", "gelu")
    pool = "map" if "attn_pool.latent" in shapes else "avg"
    args |= {"class_token": False, "global_pool": pool, "fc_norm": False}
    return Built(vit_name(args, "_siglip"), args)


SIGLIP = Family(
    "image tower of SigLIP of transformers",
    {
        **_TOWER,
        "head.probe": "attn_pool.latent",
        **{
            f"head.attention.in_proj_{kind}": (
                *(f"attn_pool.q.{kind}", f"attn_pool.kv#0.{kind}", f"attn_pool.kv#1.{kind}"),
            )
            for kind in ("weight", "bias")
        },
        "head.attention.out_proj": "attn_pool.proj",
        "head.layernorm": "attn_pool.norm",
        "head.mlp": "attn_pool.mlp",
    },
    signs=(("embeddings.position_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight"),),
    unlike=("pre_layrnorm.weight",),
    prefixes=("vision_model.",),
    left_out=_NOT_THE_TOWER,
    finish=_finish_siglip,
    model_types=("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model"),
    build=_build_siglip,
)

_MAX_STAGES = 8
_SWIN_SIZES = {(96, 6): "tiny", (96, 18): "small", (128, 18): "base", (192, 18): "large"}
"""Sizes in timm's names, by the width of the first stage and the depth of the third."""
_ATTENTION = "encoder.layers.*.blocks.*.attention.self"
_MODULE = "encoder.layers.*.blocks.*.attention"
"""The same module under the names of transformers 5, which differ from those in its files."""
_ATTN = "layers.*.blocks.*.attn"
_SWIN: Names = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.norm": "patch_embed.norm",
    **_separate(_ATTENTION, f"{_ATTN}.qkv"),
    f"{_ATTENTION}.relative_position_bias_table": f"{_ATTN}.relative_position_bias_table",
    f"{_ATTENTION}.continuous_position_bias_mlp": f"{_ATTN}.cpb_mlp",
    f"{_ATTENTION}.logit_scale": f"{_ATTN}.logit_scale",
    **_separate(_MODULE, f"{_ATTN}.qkv", _PROJECTIONS),
    f"{_MODULE}.o_proj": f"{_ATTN}.proj",
    f"{_MODULE}.relative_position_bias": _ATTN,
    f"{_MODULE}.output.dense": f"{_ATTN}.proj",
    "encoder.layers.*.blocks.*.mlp": "layers.*.blocks.*.mlp",
    "encoder.layers.*.blocks.*.layernorm_before": "layers.*.blocks.*.norm1",
    "encoder.layers.*.blocks.*.layernorm_after": "layers.*.blocks.*.norm2",
    "encoder.layers.*.blocks.*.intermediate.dense": "layers.*.blocks.*.mlp.fc1",
    "encoder.layers.*.blocks.*.output.dense": "layers.*.blocks.*.mlp.fc2",
    # A stage ends with its downsampling in transformers; in timm the next stage begins with it.
    **{f"encoder.layers.{n}.downsample": f"layers.{n + 1}.downsample" for n in range(_MAX_STAGES)},
    "layernorm": "norm",
    "classifier": "head.fc",
}
_SWIN_LEFT_OUT = {"embeddings.mask_token": "", "decoder": "the decoder of the pretraining"}


def _swin_args(config: Config) -> dict[str, Any]:
    config.require_eps(1e-5, 1e-5)
    config.require({"use_absolute_embeddings": False, "hidden_act": "gelu"}, "timm's Swin has one value only")
    args = config.read(
        {
            "img_size": ("image_size", 224),
            "patch_size": ("patch_size", 4),
            "in_chans": ("num_channels", 3),
            "embed_dim": ("embed_dim", 96),
            "depths": ("depths", [2, 2, 6, 2]),
            "num_heads": ("num_heads", [3, 6, 12, 24]),
            "window_size": ("window_size", 7),
            "mlp_ratio": ("mlp_ratio", 4.0),
            "qkv_bias": ("qkv_bias", True),
        }
    )
    depths, window, grid = args["depths"], args["window_size"], args["img_size"] // args["patch_size"]
    if len(depths) != len(args["num_heads"]) or len(depths) > _MAX_STAGES:
        raise config.fault("num_heads", f"one number for each of {len(depths)} stages, at most {_MAX_STAGES}")
    for stage, depth in enumerate(depths):
        # timm shifts such a grid and then pads it to whole windows, transformers pads it first.
        if grid > window and grid % window and depth > 1:
            raise CheckpointError(
                f"{config.where}: window_size {window} cannot be converted: the {grid}x{grid} grid of stage "
                f"{stage} is no multiple of it, and timm pads shifted windows in another order"
            )
        grid = (grid + 1) // 2
    return args


def swin_size(args: dict[str, Any]) -> str:
    """Return the size in timm's name for a Swin of this width and depth; ``tiny`` if timm has none."""
    return _SWIN_SIZES.get((args["embed_dim"], args["depths"][2] if len(args["depths"]) > 2 else 0), "tiny")


def _build_swin(config: Config, shapes: Shapes) -> Built:
    args = _swin_args(config)
    patterns = ("swin_{size}_patch4_window{window_size}_{img_size}", "swin_tiny_patch4_window7_224")
    return Built(timm_name(patterns, args, size=swin_size(args)), args)


def _build_swinv2(config: Config, shapes: Shapes) -> Built:
    args = _swin_args(config)
    stages = len(args["depths"])
    windows = config.get("pretrained_window_sizes", [0] * stages)
    if len(windows) < stages:
        raise config.fault("pretrained_window_sizes", f"one number for each of {stages} stages")
    args["pretrained_window_sizes"] = windows[:stages]
    patterns = ("swinv2_{size}_window{window_size}_{img_size}", "swinv2_tiny_window8_256")
    return Built(timm_name(patterns, args, size=swin_size(args)), args)


SWIN = Family(
    "Swin of transformers",
    _SWIN,
    signs=(
        ("encoder.layers.0.blocks.0.attention.self.relative_position_bias_table",),
        ("encoder.layers.0.blocks.0.attention.relative_position_bias.relative_position_bias_table",),
    ),
    prefixes=("swin.",),
    left_out=_SWIN_LEFT_OUT,
    model_types=("swin",),
    build=_build_swin,
)
SWINV2 = Family(
    "Swin V2 of transformers",
    {f"{_ATTENTION}.query.bias": f"{_ATTN}.q_bias", f"{_ATTENTION}.value.bias": f"{_ATTN}.v_bias", **_SWIN},
    signs=(("encoder.layers.0.blocks.0.attention.self.logit_scale",),),
    prefixes=("swinv2.",),
    left_out=_SWIN_LEFT_OUT,
    model_types=("swinv2",),
    build=_build_swinv2,
)
