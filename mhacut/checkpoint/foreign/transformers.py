"""Convert transformers models to timm: arguments from the configuration, and tensors that change shape."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mhacut.checkpoint.foreign.config import Config
from mhacut.checkpoint.foreign.family import (
    ACTIVATIONS,
    Shapes,
    TimmSpec,
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


def _vit_args(config: Config, act: str = "gelu", patch: int = 16) -> dict[str, Any]:
    args = config.read({**_VIT_ARGS, "patch_size": ("patch_size", patch)})
    args["mlp_ratio"] = mlp_ratio(config.get("intermediate_size", 3072), args["embed_dim"])
    stated = config.get("hidden_act", act)
    if stated not in ACTIVATIONS:
        raise config.fault("hidden_act", f"one of {', '.join(ACTIVATIONS)}")
    return args if stated == "gelu" else {**args, "act_layer": ACTIVATIONS[stated]}


def _finish_vit(tensors: dict[str, Tensor]) -> None:
    """If the distillation token has no classifier, rename the token to timm's register token."""
    if "head_dist.weight" not in tensors:
        move(tensors, "dist_token", "reg_token")


def _build_vit(config: Config, shapes: Shapes) -> TimmSpec:
    args = {**_vit_args(config), "qkv_bias": config.get("qkv_bias", True)}
    name = vit_name(args)
    if config.get("layer_norm_eps", 1e-12) > 5e-6:  # the ViTs of timm whose norms add 1e-5 are those of CLIP
        config.require_eps(1e-5, 1e-12)
        name, args["pre_norm"] = "vit_base_patch16_clip_224", False
    # Two classifiers, whose logits timm averages too.
    if "dist_token" in shapes:
        config.require_eps(1e-6, 1e-12)
        return TimmSpec("deit_base_distilled_patch16_224", args)
    if "reg_token" in shapes:
        args["reg_tokens"] = 1
    return TimmSpec(name, args)


def _build_beit(config: Config, shapes: Shapes) -> TimmSpec:
    config.require({"hidden_act": "gelu"}, "timm's BEiT has GELU")
    config.require_eps(1e-6, 1e-12)
    args = {
        **_vit_args(config),
        "use_abs_pos_emb": config.get("use_absolute_position_embeddings", False),
        "use_rel_pos_bias": config.get("use_relative_position_bias", False),
        "use_shared_rel_pos_bias": config.get("use_shared_relative_position_bias", False),
        # 0 stands for no LayerScale there, None here.
        "init_values": config.get("layer_scale_init_value", 0.1) or None,
        "global_pool": "avg" if config.get("use_mean_pooling", True) else "token",
        "use_fc_norm": "fc_norm.weight" in shapes,
    }
    patterns = ("beit_{size}_patch{patch_size}_{img_size}", "beit_base_patch16_224")
    return TimmSpec(timm_name(patterns, args, size=vit_size(args)), args)


def _finish_dinov2(tensors: dict[str, Tensor]) -> None:
    """Insert zero positions for the registers, because timm inserts registers before adding positions."""
    registers = tensors.get("reg_token")
    if registers is not None:
        positions = tensors["pos_embed"]
        none = torch.zeros_like(registers, dtype=positions.dtype)
        tensors["pos_embed"] = torch.cat([positions[:, :1], none, positions[:, 1:]], dim=1)


def _build_dinov2(config: Config, shapes: Shapes) -> TimmSpec:
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
    # The configuration of DINOv2 without registers does not say so.
    registers = shapes.get("reg_token", (0, 0, 0))[1]
    if registers:
        args |= {"reg_tokens": registers, "no_embed_class": False}
    if config.get("use_swiglu_ffn", False):
        # Two thirds of the channels, a multiple of 8; timm counts gates and values together.
        gated = (int(hidden * 2 / 3) + 7) // 8 * 8
        args["mlp_ratio"], size = mlp_ratio(2 * gated, width), "giant"
        args.pop("act_layer", None)  # always SiLU
    ending = f"patch14_{'reg4_' if registers else ''}dinov2"
    return TimmSpec(timm_name(("vit_{size}_" + ending, f"vit_base_{ending}"), args, size=size), args)


def _finish_dinov3(tensors: dict[str, Tensor]) -> None:
    """Rename ``fc1_x`` to ``fc1`` in MLPs without a gate, and delete an empty register tensor."""
    if not any(name.endswith(".mlp.fc1_g.weight") for name in tensors):
        for name in [name for name in tensors if ".mlp.fc1_x." in name]:
            tensors[name.replace("fc1_x", "fc1")] = tensors.pop(name)
    if "reg_token" in tensors and not tensors["reg_token"].shape[1]:
        del tensors["reg_token"]


def _build_dinov3(config: Config, shapes: Shapes) -> TimmSpec:
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
    return TimmSpec(timm_name(patterns, args, size=vit_size(args) or "base"), args)


def finish_clip(tensors: dict[str, Tensor]) -> None:
    """Reshape class token and positions for timm, in place. A ``head`` without bias gets a zero bias."""
    tensors["cls_token"] = tensors["cls_token"].reshape(1, 1, -1)
    tensors["pos_embed"] = tensors["pos_embed"].unsqueeze(0)
    head = tensors.get("head.weight")
    if head is not None and "head.bias" not in tensors:
        tensors["head.bias"] = torch.zeros(head.shape[0], dtype=head.dtype, device=head.device)


def _finish_clip(tensors: dict[str, Tensor]) -> None:
    """If there is a classifier, drop the last norm and the projection, which the classifier does not use."""
    classified = "head.weight" in tensors
    move(tensors, "projection.", None if classified else "head.")
    if classified:
        move(tensors, "norm.", None)
    finish_clip(tensors)


def _build_clip(config: Config, shapes: Shapes) -> TimmSpec:
    config.require_eps(1e-5, 1e-5)
    args = _vit_args(config, "quick_gelu", patch=32)
    # The classifier reads the mean of the patches, as the last block leaves them.
    if "norm.weight" not in shapes:
        args |= {"global_pool": "avg", "final_norm": False}
    suffix = "_clip_quickgelu" if args.get("act_layer") == "quick_gelu" else "_clip"
    args.setdefault("act_layer", "gelu")
    return TimmSpec(vit_name(args, suffix), args)


def _finish_siglip(tensors: dict[str, Tensor]) -> None:
    """Reshape a linear patch embedding to a convolution. With a classifier, drop attention pooling."""
    if "head.weight" in tensors:
        move(tensors, "attn_pool.", None)
    tensors["pos_embed"] = tensors["pos_embed"].unsqueeze(0)
    patches = tensors["patch_embed.proj.weight"]
    # Channels come last in a flattened patch, and first in a convolution.
    if patches.dim() == 2:  # (D, patch * patch * 3)
        side = math.isqrt(patches.shape[1] // 3)
        square = patches.reshape(patches.shape[0], side, side, 3)
        tensors["patch_embed.proj.weight"] = square.permute(0, 3, 1, 2).contiguous()


def _build_siglip(config: Config, shapes: Shapes) -> TimmSpec:
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
    return TimmSpec(vit_name(args, "_siglip"), args)


_MAX_STAGES = 8
_SWIN_SIZES = {(96, 6): "tiny", (96, 18): "small", (128, 18): "base", (192, 18): "large"}
"""Size in the names of timm's Swin models, by (width of stage 1, number of blocks in stage 3)."""


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


def _swin_size(args: dict[str, Any]) -> str:
    return _SWIN_SIZES.get((args["embed_dim"], args["depths"][2] if len(args["depths"]) > 2 else 0), "tiny")


def _build_swin(config: Config, shapes: Shapes) -> TimmSpec:
    args = _swin_args(config)
    patterns = ("swin_{size}_patch4_window{window_size}_{img_size}", "swin_tiny_patch4_window7_224")
    return TimmSpec(timm_name(patterns, args, size=_swin_size(args)), args)


def _build_swinv2(config: Config, shapes: Shapes) -> TimmSpec:
    args = _swin_args(config)
    stages = len(args["depths"])
    windows = config.get("pretrained_window_sizes", [0] * stages)
    if len(windows) < stages:
        raise config.fault("pretrained_window_sizes", f"one number for each of {stages} stages")
    args["pretrained_window_sizes"] = windows[:stages]
    patterns = ("swinv2_{size}_window{window_size}_{img_size}", "swinv2_tiny_window8_256")
    return TimmSpec(timm_name(patterns, args, size=_swin_size(args)), args)


_PVT_SIZES = {
    (32, 2, 2): "b0",
    (64, 2, 2): "b1",
    (64, 4, 6): "b2",
    (64, 4, 18): "b3",
    (64, 8, 27): "b4",
    (64, 6, 40): "b5",
}
"""Size in the names of timm's PVT v2 models, by (width of stage 1, blocks in stage 2, blocks in stage 3)."""


def _build_pvt(config: Config, shapes: Shapes) -> TimmSpec:
    config.require_eps(1e-6, 1e-6)
    strides = {"patch_sizes": [7, 3, 3, 3], "strides": [4, 2, 2, 2], "num_encoder_blocks": 4}
    fixed = {**strides, "hidden_act": "gelu", "linear_attention": False}
    config.require(fixed, "mhacut has compared timm's PVTv2 with one value only")
    args = config.read(
        {
            "embed_dims": ("hidden_sizes", [32, 64, 160, 256]),
            "depths": ("depths", [2, 2, 2, 2]),
            "num_heads": ("num_attention_heads", [1, 2, 5, 8]),
            "sr_ratios": ("sr_ratios", [8, 4, 2, 1]),
            "mlp_ratios": ("mlp_ratios", [8, 8, 4, 4]),
        }
    )
    for name, value in args.items():
        if len(value) != 4:
            raise CheckpointError(f"{config.where}: expected four stages, found {name} {value}")
    size = _PVT_SIZES.get((args["embed_dims"][0], args["depths"][1], args["depths"][2]), "b0")
    args |= config.read({"in_chans": ("num_channels", 3), "qkv_bias": ("qkv_bias", True)})
    return TimmSpec(f"pvt_v2_{size}", args, side=config.get("image_size", 224))


FUNCTIONS: dict[str, dict[str, Any]] = {
    "ViT of transformers": {"build": _build_vit, "finish": _finish_vit},
    "BEiT of transformers": {"build": _build_beit},
    "DINOv2 of transformers": {"build": _build_dinov2, "finish": _finish_dinov2},
    "DINOv3 of transformers": {"build": _build_dinov3, "finish": _finish_dinov3},
    "image tower of CLIP of transformers": {"build": _build_clip, "finish": _finish_clip},
    "image tower of SigLIP of transformers": {"build": _build_siglip, "finish": _finish_siglip},
    "Swin of transformers": {"build": _build_swin},
    "Swin V2 of transformers": {"build": _build_swinv2},
    "PVTv2 of transformers": {"build": _build_pvt},
}
