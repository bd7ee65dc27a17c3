"""Models of torchvision and image towers of open_clip; models of timm that other libraries wrap."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from mhacut.checkpoint.build import known_model, unknown_model
from mhacut.checkpoint.foreign.config import Config
from mhacut.checkpoint.foreign.family import (
    VIT_SIZES,
    Built,
    Family,
    Names,
    Shapes,
    depth_of,
    mlp_ratio,
    vit_name,
)
from mhacut.checkpoint.foreign.images import OF_CLIP, OF_IMAGENET
from mhacut.checkpoint.foreign.transformers import finish_clip, swin_size
from mhacut.checkpoint.identity import checked_model_args, checked_pretrained_cfg
from mhacut.errors import CheckpointError


def _vit_args(shapes: Shapes, heads: int) -> dict[str, Any]:
    """Return the arguments of a ViT that shapes show, under timm's names, and its number of heads."""
    patches = shapes["patch_embed.proj.weight"]
    width, patch = patches[0], patches[3]
    return {
        "img_size": patch * math.isqrt(max(shapes["pos_embed"][1] - 1, 1)),
        "patch_size": patch,
        "in_chans": patches[1],
        "embed_dim": width,
        "depth": depth_of(shapes),
        "num_heads": heads,
        "mlp_ratio": mlp_ratio(shapes["blocks.0.mlp.fc1.weight"][0], width),
    }


def _guess_vit(shapes: Shapes, _: Shapes) -> Built | None:
    """Return the ViT of one of the published sizes; shapes do not show the number of heads of others."""
    known = {size[:2]: size[2] for size in VIT_SIZES}
    heads = known.get((shapes["norm.weight"][0], depth_of(shapes)))
    if heads is None:
        return None
    args = _vit_args(shapes, heads)
    size = VIT_SIZES[args["embed_dim"], args["depth"], heads]
    crop = {"crop_pct": 1.0, "interpolation": "bicubic"}  # of weights pretrained by SWAG, as all of ViT-H are
    if args["img_size"] == 224 and size != "huge":
        resized = 242 if (size, args["patch_size"]) == ("large", 16) else 256
        crop = {"crop_pct": 224 / resized, "interpolation": "bilinear"}
    return Built(vit_name(args), args, cfg={**OF_IMAGENET, **crop})


_ENCODER = "encoder.layers.encoder_layer_*"
TORCHVISION_VIT = Family(
    "ViT of torchvision",
    {
        "class_token": "cls_token",
        "conv_proj": "patch_embed.proj",
        "encoder.pos_embedding": "pos_embed",
        f"{_ENCODER}.ln_1": "blocks.*.norm1",
        f"{_ENCODER}.ln_2": "blocks.*.norm2",
        f"{_ENCODER}.self_attention.in_proj_weight": "blocks.*.attn.qkv.weight",
        f"{_ENCODER}.self_attention.in_proj_bias": "blocks.*.attn.qkv.bias",
        f"{_ENCODER}.self_attention.out_proj": "blocks.*.attn.proj",
        f"{_ENCODER}.mlp.0": "blocks.*.mlp.fc1",
        f"{_ENCODER}.mlp.3": "blocks.*.mlp.fc2",
        f"{_ENCODER}.mlp.linear_1": "blocks.*.mlp.fc1",
        f"{_ENCODER}.mlp.linear_2": "blocks.*.mlp.fc2",
        "encoder.ln": "norm",
        "heads.head": "head",
        "heads.weight": "head.weight",
        "heads.bias": "head.bias",
    },
    signs=(("encoder.layers.encoder_layer_0.self_attention.in_proj_weight", "conv_proj.weight"),),
    refused={"heads.pre_logits": "timm's ViT has one linear layer as its classifier"},
    guess=_guess_vit,
    cfg=OF_IMAGENET,
)


def _swin_names() -> Names:
    names = {"features.0.0": "patch_embed.proj", "features.0.2": "patch_embed.norm"}
    for stage in range(8):
        block, timms = f"features.{2 * stage + 1}.*", f"layers.{stage}.blocks.*"
        names |= {f"{block}.mlp.0": f"{timms}.mlp.fc1", f"{block}.mlp.3": f"{timms}.mlp.fc2"}
        names |= {f"{block}.{part}": f"{timms}.{part}" for part in ("norm1", "norm2", "attn")}
        names[f"features.{2 * stage + 2}"] = f"layers.{stage + 1}.downsample"
    return {**names, "norm": "norm", "head": "head.fc"}


def _finish_swin(tensors: dict[str, Tensor]) -> None:
    """Split the biases of Swin V2's attention. Those of keys go: torchvision uses zeros in their place."""
    for name in [name for name in tensors if name.endswith(".logit_scale")]:
        prefix = name.removesuffix("logit_scale")
        tensors[f"{prefix}q_bias"], _, tensors[f"{prefix}v_bias"] = tensors.pop(f"{prefix}qkv.bias").chunk(3)


def _guess_swin(shapes: Shapes, original: Shapes) -> Built:
    """Return the Swin, or Swin V2, that the shapes of its windows and blocks show."""
    second = "layers.0.blocks.0.attn.logit_scale" in shapes
    if second:
        window = (original["features.1.0.attn.relative_coords_table"][1] + 1) // 2
    else:
        positions = shapes["layers.0.blocks.0.attn.relative_position_bias_table"][0]
        window = (math.isqrt(positions) + 1) // 2
    heads, dim = ("logit_scale", 0) if second else ("relative_position_bias_table", 1)
    stages = depth_of(shapes, "layers.")
    patch, width = shapes["patch_embed.proj.weight"][-1], shapes["patch_embed.norm.weight"][0]
    args = {
        "img_size": window * patch * 2 ** (stages - 1),
        "patch_size": patch,
        "in_chans": shapes["patch_embed.proj.weight"][1],
        "embed_dim": width,
        "depths": [depth_of(shapes, f"layers.{stage}.blocks.") for stage in range(stages)],
        "num_heads": [shapes[f"layers.{stage}.blocks.0.attn.{heads}"][dim] for stage in range(stages)],
        "window_size": window,
        "mlp_ratio": shapes["layers.0.blocks.0.mlp.fc1.weight"][0] / width,
    }
    size = swin_size(args)
    if second:
        side, resized, ending = 256, {"base": 272}.get(size, 260), "window8_256"
    else:
        resized = {"tiny": 232, "small": 246, "base": 238}.get(size, 256)
        side, ending = 224, "patch4_window7_224"
    name = f"swin{'v2' if second else ''}_{size if size != 'large' else 'tiny'}_{ending}"
    return Built(name, args, cfg={**OF_IMAGENET, "interpolation": "bicubic", "crop_pct": side / resized})


TORCHVISION_SWIN = Family(
    "Swin of torchvision",
    _swin_names(),
    signs=(
        ("features.1.0.attn.relative_position_bias_table", "features.0.0.weight"),
        ("features.1.0.attn.logit_scale", "features.1.0.attn.relative_coords_table"),
    ),
    finish=_finish_swin,
    guess=_guess_swin,
    cfg=OF_IMAGENET,
)

_TEXT = "the text tower"
_OF_OPENAI = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI's own archives keep among the tensors; no other file of these names has them."""
_NOT_THE_TOWER = {
    **dict.fromkeys(("transformer", "token_embedding", "positional_embedding", "ln_final"), _TEXT),
    **dict.fromkeys(("text_projection", "text"), _TEXT),
    **dict.fromkeys(("attn_mask", "logit_scale", "logit_bias", *_OF_OPENAI), ""),
}
"""Tensors that are not part of the image tower, and what they are, for the log."""
_STATED: dict[str, Any] = {
    **dict.fromkeys(("no_ln_pre", "attentional_pool", "final_ln_after_pool", "qk_norm"), False),
    **dict.fromkeys(
        ("scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), False
    ),
    "pos_embed_type": "learnable",
    "pool_type": "tok",
}
"""Values of ``vision_cfg`` with which the model computes what timm's ViT of CLIP does."""


def _finish_open_clip(tensors: dict[str, Tensor]) -> None:
    if "head.weight" in tensors:
        tensors["head.weight"] = tensors["head.weight"].t().contiguous()
    finish_clip(tensors)


def _build_open_clip(config: Config, shapes: Shapes) -> Built:
    tower = config.part("vision_cfg")
    if isinstance(tower.raw("layers"), list):
        raise CheckpointError(f"{tower.where}: layers: ResNets of CLIP have no attention that mhacut cuts")
    tower.require(_STATED, "timm's ViT of CLIP has one value only")
    for name in ("act_kwargs", "norm_kwargs", "block_type"):
        if tower.raw(name):
            raise CheckpointError(f"{tower.where}: {name} cannot be converted: timm's ViT of CLIP has none")
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
    return Built(vit_name(args, "_clip_quickgelu" if quick else "_clip"), args)


def _guess_open_clip(shapes: Shapes, original: Shapes) -> Built | None:
    """Return the model of OpenAI's weights, which have QuickGELU and heads of 64; that of others is open."""
    if not set(_OF_OPENAI) <= original.keys():
        return None
    args = _vit_args(shapes, max(shapes["patch_embed.proj.weight"][0] // 64, 1))
    cfg = {**OF_CLIP, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
    return Built(vit_name(args, "_clip_quickgelu"), {**args, "act_layer": "quick_gelu"}, cfg=cfg)


_RESBLOCK = "visual.transformer.resblocks.*"
OPEN_CLIP = Family(
    "image tower of CLIP of open_clip",
    {
        "visual.class_embedding": "cls_token",
        "visual.positional_embedding": "pos_embed",
        "visual.conv1": "patch_embed.proj",
        "visual.ln_pre": "norm_pre",
        "visual.ln_post": "norm",
        "visual.proj": "head.weight",
        f"{_RESBLOCK}.ln_1": "blocks.*.norm1",
        f"{_RESBLOCK}.ln_2": "blocks.*.norm2",
        f"{_RESBLOCK}.attn.in_proj_weight": "blocks.*.attn.qkv.weight",
        f"{_RESBLOCK}.attn.in_proj_bias": "blocks.*.attn.qkv.bias",
        f"{_RESBLOCK}.attn.out_proj": "blocks.*.attn.proj",
        f"{_RESBLOCK}.mlp.c_fc": "blocks.*.mlp.fc1",
        f"{_RESBLOCK}.mlp.c_proj": "blocks.*.mlp.fc2",
        f"{_RESBLOCK}.ls_1.gamma": "blocks.*.ls1.gamma",
        f"{_RESBLOCK}.ls_2.gamma": "blocks.*.ls2.gamma",
    },
    signs=(("visual.transformer.resblocks.0.attn.in_proj_weight", "visual.conv1.weight"),),
    left_out=_NOT_THE_TOWER,
    finish=_finish_open_clip,
    build=_build_open_clip,
    guess=_guess_open_clip,
)


def preprocess_cfg(stated: Config) -> dict[str, Any]:
    """Return timm's pretrained_cfg of a ``preprocess_cfg`` of open_clip.

    Raises:
        CheckpointError: a value is of another type or out of bounds, or timm has no such ``resize_mode``.
    """
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
"""Prefix of a model of timm in open_clip."""
WRAPPED = "timm_model."
"""Prefix of a model of timm in transformers."""
_POOLS = ("", "avg", "token", "map")
_PROJECTION = "the projection to the space of the texts"


def _named(config: Config, key: str) -> str:
    """Return the architecture of timm that a configuration names."""
    architecture = config.get(key, "").partition(".")[0]
    if not known_model(architecture):
        raise CheckpointError(f"{config.where}: {key}: {unknown_model(architecture)}")
    return architecture


def _build_trunk(config: Config, shapes: Shapes) -> Built:
    tower = config.part("vision_cfg")
    architecture, pool = _named(tower, "timm_model_name"), tower.get("timm_pool", "avg")
    if pool not in _POOLS:
        raise tower.fault("timm_pool", f"one of {', '.join(filter(None, _POOLS))}, which timm has")
    # The name states the image size, or the shape of the position embedding shows it.
    return Built(architecture, {"num_classes": 0, **({"global_pool": pool} if pool else {})})


OPEN_CLIP_TRUNK = Family(
    "image tower of timm in open_clip",
    {},
    signs=(("visual.trunk.patch_embed.proj.weight",),),
    prefixes=(TRUNK,),
    others=True,
    left_out={**_NOT_THE_TOWER, "visual.head.proj": _PROJECTION, "visual.head.mlp": _PROJECTION},
    build=_build_trunk,
)


def _build_wrapped(config: Config, shapes: Shapes) -> Built:
    architecture = _named(config, "architecture")
    args = checked_model_args(config.raw("model_args") or {})
    args.pop("num_classes", None)
    return Built(architecture, args, cfg=checked_pretrained_cfg(config.raw("pretrained_cfg") or {}))


TIMM_WRAPPER = Family(
    "model of timm in transformers",
    {},
    prefixes=(WRAPPED,),
    others=True,
    model_types=("timm_wrapper",),
    build=_build_wrapped,
)
