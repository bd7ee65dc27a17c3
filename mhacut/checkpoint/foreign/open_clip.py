"""Image towers of open_clip: its own ViT."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from mhacut.checkpoint.foreign.clip import finish_clip
from mhacut.checkpoint.foreign.config import Config
from mhacut.checkpoint.foreign.family import Built, Family, Shapes, depth_of, mlp_ratio
from mhacut.checkpoint.foreign.images import OF_CLIP
from mhacut.checkpoint.foreign.rename import Renaming
from mhacut.checkpoint.foreign.vit import size_name, vit_name
from mhacut.errors import CheckpointError

_TEXT = "the text tower"
_OF_OPENAI = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI's own archives keep among the tensors; no other file of these names has them."""
_IMAGES_OF_OPENAI: dict[str, Any] = {
    **OF_CLIP,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
NOT_THE_TOWER = {
    "transformer": _TEXT,
    "token_embedding": _TEXT,
    "positional_embedding": _TEXT,
    "ln_final": _TEXT,
    "text_projection": _TEXT,
    "text": _TEXT,
    "attn_mask": "",
    "logit_scale": "",
    "logit_bias": "",
    **dict.fromkeys(_OF_OPENAI, ""),
}
"""Tensors that are not part of the image tower, and what they are, for the log."""
_NAMES = {
    "visual.class_embedding": "cls_token",
    "visual.positional_embedding": "pos_embed",
    "visual.conv1": "patch_embed.proj",
    "visual.ln_pre": "norm_pre",
    "visual.ln_post": "norm",
    "visual.proj": "head.weight",
    "visual.transformer.resblocks.*.ln_1": "blocks.*.norm1",
    "visual.transformer.resblocks.*.ln_2": "blocks.*.norm2",
    "visual.transformer.resblocks.*.attn.in_proj_weight": "blocks.*.attn.qkv.weight",
    "visual.transformer.resblocks.*.attn.in_proj_bias": "blocks.*.attn.qkv.bias",
    "visual.transformer.resblocks.*.attn.out_proj": "blocks.*.attn.proj",
    "visual.transformer.resblocks.*.mlp.c_fc": "blocks.*.mlp.fc1",
    "visual.transformer.resblocks.*.mlp.c_proj": "blocks.*.mlp.fc2",
    "visual.transformer.resblocks.*.ls_1.gamma": "blocks.*.ls1.gamma",
    "visual.transformer.resblocks.*.ls_2.gamma": "blocks.*.ls2.gamma",
}
_REFUSED = {"visual.attn_pool": "timm has no pooling of this kind (CoCa)"}
_STATED: dict[str, Any] = {
    "no_ln_pre": False,
    "attentional_pool": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "pool_type": "tok",
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
"""Values of ``vision_cfg`` with which the model computes what timm's ViT of CLIP does."""


def _renaming(shapes: Shapes) -> Renaming:
    return Renaming(_NAMES, NOT_THE_TOWER, _REFUSED, finish=_finish)


def _finish(tensors: dict[str, Tensor]) -> None:
    if "head.weight" in tensors:
        tensors["head.weight"] = tensors["head.weight"].t().contiguous()
    finish_clip(tensors)


def _build(config: Config, shapes: Shapes) -> Built:
    tower = config.part("vision_cfg")
    for name, value in _STATED.items():
        tower.require(name, value, reason="timm's ViT of CLIP has one value only")
    for name in ("act_kwargs", "norm_kwargs", "block_type"):
        if tower.raw(name):
            raise CheckpointError(f"{tower.where}: {name} cannot be converted: timm's ViT of CLIP has none")
    if isinstance(tower.raw("layers"), list):
        raise CheckpointError(f"{tower.where}: layers: ResNets of CLIP have no attention that mhacut cuts")
    width, head_width = tower.size("width", 768), tower.size("head_width", 64)
    quick = config.flag("quick_gelu", False)
    hidden = int(width * tower.number("mlp_ratio", 4.0))
    args: dict[str, Any] = {
        "img_size": tower.side("image_size", 224),
        "patch_size": tower.side("patch_size", 16),
        "embed_dim": width,
        "depth": tower.size("layers", 12),
        "num_heads": max(width // head_width, 1),
        "mlp_ratio": mlp_ratio(hidden, width),
        "act_layer": "quick_gelu" if quick else "gelu",
    }
    if tower.raw("ls_init_value") is not None:
        args["init_values"] = tower.number("ls_init_value")
    return Built(_name(args, quick), args)


def _name(args: dict[str, Any], quick: bool) -> str:
    suffix = "_clip_quickgelu" if quick else "_clip"
    return vit_name(size_name(args), args["patch_size"], args["img_size"], suffix)


def _guess(shapes: Shapes, original: Shapes) -> Built | None:
    """Return the model of OpenAI's weights, which have QuickGELU and heads of 64; that of others is open."""
    if not set(_OF_OPENAI) <= original.keys():
        return None
    patches = shapes["patch_embed.proj.weight"]
    width, patch = patches[0], patches[3]
    args: dict[str, Any] = {
        "img_size": patch * math.isqrt(max(shapes["pos_embed"][1] - 1, 1)),
        "patch_size": patch,
        "in_chans": patches[1],
        "embed_dim": width,
        "depth": depth_of(shapes),
        "num_heads": max(width // 64, 1),
        "mlp_ratio": mlp_ratio(shapes["blocks.0.mlp.fc1.weight"][0], width),
        "act_layer": "quick_gelu",
    }
    return Built(_name(args, quick=True), args, cfg=_IMAGES_OF_OPENAI)


OPEN_CLIP = Family(
    "image tower of CLIP of open_clip",
    (("visual.transformer.resblocks.0.attn.in_proj_weight", "visual.conv1.weight"),),
    _renaming,
    _build,
    _guess,
)


def preprocess_cfg(stated: Config) -> dict[str, Any]:
    """Return timm's pretrained_cfg of a ``preprocess_cfg`` of open_clip.

    Raises:
        CheckpointError: a value is of another type or out of bounds, or timm has no such ``resize_mode``.
    """
    cfg: dict[str, Any] = {"crop_pct": 1.0}
    for name in ("mean", "std"):
        if name in stated:
            cfg[name] = stated.numbers(name, 3)
    modes = {"shortest": "center", "squash": "squash", "longest": "border"}
    mode, interpolation = stated.text("resize_mode", "shortest"), stated.text("interpolation", "bicubic")
    if mode not in modes:
        raise stated.fault("resize_mode", f"one of {', '.join(modes)}")
    if interpolation in ("bilinear", "bicubic"):  # the other is "random"
        cfg["interpolation"] = interpolation
    return {**cfg, "crop_mode": modes[mode]}
