"""Models of torchvision, open_clip and original authors, and timm models wrapped by other libraries."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from mhacut.checkpoint.build import known_model, unknown_model
from mhacut.checkpoint.foreign.config import IMAGENET_CFG, Config
from mhacut.checkpoint.foreign.family import (
    Shapes,
    TimmSpec,
    mlp_ratio,
    move,
    vit_name,
)
from mhacut.checkpoint.foreign.transformers import finish_clip
from mhacut.checkpoint.identity import checked_model_args, checked_pretrained_cfg
from mhacut.errors import CheckpointError


def _finish_swin(tensors: dict[str, Tensor]) -> None:
    """Split Swin V2's qkv biases into q and v biases. torchvision keeps the k bias at 0, so it is dropped."""
    for name in [name for name in tensors if name.endswith(".logit_scale")]:
        prefix = name.removesuffix("logit_scale")
        tensors[f"{prefix}q_bias"], _, tensors[f"{prefix}v_bias"] = tensors.pop(f"{prefix}qkv.bias").chunk(3)


_STATED: dict[str, Any] = {
    **dict.fromkeys(("no_ln_pre", "attentional_pool", "final_ln_after_pool", "qk_norm"), False),
    **dict.fromkeys(
        ("scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), False
    ),
    "pos_embed_type": "learnable",
    "pool_type": "tok",
}
"""Required values in open_clip's ``vision_cfg``. For other values, timm's CLIP ViT has different outputs."""


def _finish_open_clip(tensors: dict[str, Tensor]) -> None:
    # A matrix that is multiplied from the right, (width, embedding), not a layer.
    if "head.weight" in tensors:
        tensors["head.weight"] = tensors["head.weight"].t().contiguous()
    finish_clip(tensors)


def _build_open_clip(config: Config, shapes: Shapes) -> TimmSpec:
    tower = config.part("vision_cfg")
    if isinstance(tower.raw("layers"), list):
        raise CheckpointError(f"{tower.where}: found a CLIP ResNet, expected a CLIP ViT")
    tower.require(_STATED, "timm's ViT of CLIP has one value only")
    for name in ("act_kwargs", "norm_kwargs", "block_type"):
        if tower.raw(name):
            raise CheckpointError(f"{tower.where}: {name}: not supported by timm's CLIP ViT")
    args = tower.read(
        {
            "img_size": ("image_size", 224),
            "patch_size": ("patch_size", 16),
            "embed_dim": ("width", 768),
            "depth": ("layers", 12),
        }
    )
    width, quick = args["embed_dim"], config.get("quick_gelu", False)
    args |= {
        "num_heads": max(width // tower.get("head_width", 64), 1),
        "mlp_ratio": mlp_ratio(int(width * tower.get("mlp_ratio", 4.0)), width),
        "act_layer": "quick_gelu" if quick else "gelu",
    }
    if "ls_init_value" in tower:
        args["init_values"] = tower.get("ls_init_value", 0.0)
    return TimmSpec(vit_name(args, "_clip_quickgelu" if quick else "_clip"), args)


def preprocess_cfg(stated: Config) -> dict[str, Any]:
    cfg: dict[str, Any] = {"crop_pct": 1.0}
    cfg |= {name: stated.numbers(name, 3) for name in ("mean", "std") if name in stated}
    modes = {"shortest": "center", "squash": "squash", "longest": "border"}
    mode, interpolation = stated.get("resize_mode", "shortest"), stated.get("interpolation", "bicubic")
    if mode not in modes:
        raise stated.fault("resize_mode", f"one of {', '.join(modes)}")
    if interpolation in ("bilinear", "bicubic"):  # the other is "random"
        cfg["interpolation"] = interpolation
    return {**cfg, "crop_mode": modes[mode]}


TRUNK = "visual.trunk."
WRAPPED = "timm_model."
_POOLS = ("", "avg", "token", "map")


def _named(config: Config, key: str) -> str:
    architecture = config.get(key, "").partition(".")[0]
    if not known_model(architecture):
        raise CheckpointError(f"{config.where}: {key}: {unknown_model(architecture)}")
    return architecture


def _build_trunk(config: Config, shapes: Shapes) -> TimmSpec:
    tower = config.part("vision_cfg")
    architecture, pool = _named(tower, "timm_model_name"), tower.get("timm_pool", "avg")
    if pool not in _POOLS:
        raise tower.fault("timm_pool", f"one of {', '.join(filter(None, _POOLS))}, which timm has")
    # The name states the image size, or the shape of the position embedding shows it.
    return TimmSpec(architecture, {"num_classes": 0, **({"global_pool": pool} if pool else {})})


def _build_wrapped(config: Config, shapes: Shapes) -> TimmSpec:
    architecture = _named(config, "architecture")
    args = checked_model_args(config.raw("model_args") or {})
    args.pop("num_classes", None)  # the classifier's shape shows it
    return TimmSpec(architecture, args, cfg=checked_pretrained_cfg(config.raw("pretrained_cfg") or {}))


def _finish_dinov2(tensors: dict[str, Tensor]) -> None:
    """With registers, fold the class token's position into the token: timm adds positions to patches only."""
    if "reg_token" in tensors:
        positions = tensors["pos_embed"]
        tensors["cls_token"] = tensors["cls_token"] + positions[:, :1].to(tensors["cls_token"].dtype)
        tensors["pos_embed"] = positions[:, 1:].clone()


def _finish_swin_of_authors(tensors: dict[str, Tensor]) -> None:
    """Move each downsampling layer from the end of a stage to the start of the next stage, as in timm."""
    if "layers.0.downsample.reduction.weight" in tensors:
        # From the last stage on: a moved name may be that of the next.
        for stage in reversed(range(8)):
            move(tensors, f"layers.{stage}.downsample.", f"layers.{stage + 1}.downsample.")
        if "head.weight" in tensors:
            move(tensors, "head.", "head.fc.")


def _finish_eva02(tensors: dict[str, Tensor]) -> None:
    """Rename the biases of separate query and value layers, for example ``q_bias`` to ``q_proj.bias``."""
    if "blocks.0.attn.q_proj.weight" in tensors:
        for name in [name for name in tensors if re.fullmatch(r"blocks\.\d+\.attn\.[qv]_bias", name)]:
            tensors[name.replace("_bias", "_proj.bias")] = tensors.pop(name)


FUNCTIONS: dict[str, dict[str, Any]] = {
    "ViT of torchvision": {"cfg": IMAGENET_CFG},
    "Swin of torchvision": {"finish": _finish_swin, "cfg": IMAGENET_CFG},
    "image tower of CLIP of open_clip": {"build": _build_open_clip, "finish": _finish_open_clip},
    "image tower of timm in open_clip": {"build": _build_trunk},
    "model of timm in transformers": {"build": _build_wrapped},
    "DINOv2 of its authors": {"finish": _finish_dinov2},
    "ViT of MAE, iBOT and their like": {"cfg": IMAGENET_CFG},
    "EVA-02 of its authors": {"finish": _finish_eva02},
    "Swin of its authors": {"finish": _finish_swin_of_authors},
}
