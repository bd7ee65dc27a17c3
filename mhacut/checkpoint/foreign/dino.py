"""DINOv2, with and without registers, and DINOv3 of transformers."""

from __future__ import annotations

import torch
from torch import Tensor

from mhacut.checkpoint.build import known_model
from mhacut.checkpoint.foreign.config import Config
from mhacut.checkpoint.foreign.family import Built, Family, Shapes, check_eps, mlp_ratio
from mhacut.checkpoint.foreign.rename import Renaming
from mhacut.checkpoint.foreign.vit import BLOCK, EMBEDDINGS, size_name, vit_args

_DINOV2_CLASSIFIER = (
    "the classifier of DINOv2 reads the class token and the mean of the patches side by side, "
    "which no model of timm does"
)


def _dinov2_renaming(shapes: Shapes) -> Renaming:
    names = {
        **EMBEDDINGS,
        "embeddings.register_tokens": "reg_token",
        **{name: target for name, target in BLOCK.items() if ".attention." in name},
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
        refused_classifier={"classifier": _DINOV2_CLASSIFIER},
        prefixes=("dinov2.", "dinov2_with_registers."),
        finish=_place_registers,
    )


def _place_registers(tensors: dict[str, Tensor]) -> None:
    """Give registers positions of zeros: timm puts them behind the class token before it adds positions."""
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
    ending = f"patch14_{'reg4_' if registers else ''}dinov2"
    name = f"vit_{size}_{ending}"
    return Built(name if known_model(name) else f"vit_base_{ending}", args)


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
    config.require("value_bias", bias, reason="timm's DINOv3 has it where it has query_bias")
    config.require("proj_bias", True, reason="timm's DINOv3 always has it")
    config.require("mlp_bias", True, reason="timm's DINOv3 always has it")
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
        args["swiglu_align_to"] = 1  # timm then keeps gate and value in separate matrices, as the file does
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
