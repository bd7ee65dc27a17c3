"""ViT, Swin and Swin V2 of torchvision; its MaxViT is refused."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from mhacut.checkpoint.foreign.family import Built, Family, Shapes, depth_of, mlp_ratio
from mhacut.checkpoint.foreign.images import OF_IMAGENET
from mhacut.checkpoint.foreign.rename import Renaming
from mhacut.checkpoint.foreign.swin import swin_size
from mhacut.checkpoint.foreign.vit import SIZES, vit_name

_VIT_NAMES = {
    "class_token": "cls_token",
    "conv_proj": "patch_embed.proj",
    "encoder.pos_embedding": "pos_embed",
    "encoder.layers.encoder_layer_*.ln_1": "blocks.*.norm1",
    "encoder.layers.encoder_layer_*.ln_2": "blocks.*.norm2",
    "encoder.layers.encoder_layer_*.self_attention.in_proj_weight": "blocks.*.attn.qkv.weight",
    "encoder.layers.encoder_layer_*.self_attention.in_proj_bias": "blocks.*.attn.qkv.bias",
    "encoder.layers.encoder_layer_*.self_attention.out_proj": "blocks.*.attn.proj",
    "encoder.layers.encoder_layer_*.mlp.0": "blocks.*.mlp.fc1",
    "encoder.layers.encoder_layer_*.mlp.3": "blocks.*.mlp.fc2",
    "encoder.layers.encoder_layer_*.mlp.linear_1": "blocks.*.mlp.fc1",
    "encoder.layers.encoder_layer_*.mlp.linear_2": "blocks.*.mlp.fc2",
    "encoder.ln": "norm",
    "heads.head": "head",
    "heads.weight": "head.weight",
    "heads.bias": "head.bias",
}
_MAX_STAGES = 8


def _vit_renaming(shapes: Shapes) -> Renaming:
    return Renaming(
        _VIT_NAMES,
        refused_classifier={"heads.pre_logits": "timm's ViT has one linear layer as its classifier"},
    )


def _guess_vit(shapes: Shapes, _: Shapes) -> Built | None:
    """Return the ViT of one of the published sizes; shapes do not show the number of heads of others."""
    width, depth = shapes["norm.weight"][0], depth_of(shapes)
    known = {(size[0], size[1]): (size[2], name) for size, name in SIZES.items()}
    patch, tokens = shapes["patch_embed.proj.weight"][-1], shapes["pos_embed"][1]
    if (width, depth) not in known:
        return None
    heads, size = known[width, depth]
    side = math.isqrt(max(tokens - 1, 1)) * patch
    args = {
        "img_size": side,
        "patch_size": patch,
        "in_chans": shapes["patch_embed.proj.weight"][1],
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": mlp_ratio(shapes["blocks.0.mlp.fc1.weight"][0], width),
    }
    crop = {"crop_pct": 1.0, "interpolation": "bicubic"}  # of weights pretrained by SWAG, as all of ViT-H are
    if side == 224 and size != "huge":
        resized = 242 if (size, patch) == ("large", 16) else 256
        crop = {"crop_pct": 224 / resized, "interpolation": "bilinear"}
    return Built(vit_name(size, patch, side), args, cfg={**OF_IMAGENET, **crop})


TORCHVISION_VIT = Family(
    "ViT of torchvision",
    (("encoder.layers.encoder_layer_0.self_attention.in_proj_weight", "conv_proj.weight"),),
    _vit_renaming,
    guess=_guess_vit,
    cfg=OF_IMAGENET,
)


def _swin_names() -> dict[str, str]:
    names = {"features.0.0": "patch_embed.proj", "features.0.2": "patch_embed.norm"}
    for stage in range(_MAX_STAGES):
        block, timms = f"features.{2 * stage + 1}.*", f"layers.{stage}.blocks.*"
        names[f"{block}.mlp.0"] = f"{timms}.mlp.fc1"
        names[f"{block}.mlp.3"] = f"{timms}.mlp.fc2"
        for part in ("norm1", "norm2", "attn"):
            names[f"{block}.{part}"] = f"{timms}.{part}"
        names[f"features.{2 * stage + 2}"] = f"layers.{stage + 1}.downsample"
    return {**names, "norm": "norm", "head": "head.fc"}


def _swin_renaming(shapes: Shapes) -> Renaming:
    left_out = {
        "features.*.*.attn.relative_position_index": "",
        "features.*.*.attn.relative_coords_table": "",
    }
    return Renaming(_swin_names(), left_out, finish=_split_biases)


def _split_biases(tensors: dict[str, Tensor]) -> None:
    """Split the biases of Swin V2's attention. Those of keys go: torchvision uses zeros in their place."""
    for name in [name for name in tensors if name.endswith(".logit_scale")]:
        prefix = name.removesuffix("logit_scale")
        queries, _, values = tensors.pop(f"{prefix}qkv.bias").chunk(3)
        tensors[f"{prefix}q_bias"], tensors[f"{prefix}v_bias"] = queries.clone(), values.clone()


def _swin_args(shapes: Shapes, heads_of: str, window: int) -> dict[str, Any]:
    stages = depth_of(shapes, "layers.")
    patch, width = shapes["patch_embed.proj.weight"][-1], shapes["patch_embed.norm.weight"][0]
    return {
        "img_size": window * patch * 2 ** (stages - 1),
        "patch_size": patch,
        "in_chans": shapes["patch_embed.proj.weight"][1],
        "embed_dim": width,
        "depths": [depth_of(shapes, f"layers.{stage}.blocks.") for stage in range(stages)],
        "num_heads": [
            shapes[f"layers.{stage}.blocks.0.attn.{heads_of}"][0 if heads_of == "logit_scale" else 1]
            for stage in range(stages)
        ],
        "window_size": window,
        "mlp_ratio": shapes["layers.0.blocks.0.mlp.fc1.weight"][0] / width,
    }


def _guess_swin(shapes: Shapes, _: Shapes) -> Built:
    positions = shapes["layers.0.blocks.0.attn.relative_position_bias_table"][0]
    args = _swin_args(shapes, "relative_position_bias_table", (math.isqrt(positions) + 1) // 2)
    size = swin_size(args)
    resized = {"tiny": 232, "small": 246, "base": 238}.get(size, 256)
    cfg = {**OF_IMAGENET, "interpolation": "bicubic", "crop_pct": 224 / resized}
    name = size if size in ("tiny", "small", "base") else "tiny"
    return Built(f"swin_{name}_patch4_window7_224", args, cfg=cfg)


def _guess_swinv2(shapes: Shapes, original: Shapes) -> Built:
    window = (original["features.1.0.attn.relative_coords_table"][1] + 1) // 2
    args = _swin_args(shapes, "logit_scale", window)
    size = swin_size(args)
    cfg = {**OF_IMAGENET, "interpolation": "bicubic", "crop_pct": 256 / (272 if size == "base" else 260)}
    name = size if size in ("tiny", "small", "base") else "tiny"
    return Built(f"swinv2_{name}_window8_256", args, cfg=cfg)


TORCHVISION_SWIN = Family(
    "Swin of torchvision",
    (("features.1.0.attn.relative_position_bias_table", "features.0.0.weight"),),
    _swin_renaming,
    guess=_guess_swin,
    cfg=OF_IMAGENET,
)
TORCHVISION_SWINV2 = Family(
    "Swin V2 of torchvision",
    (("features.1.0.attn.logit_scale", "features.1.0.attn.relative_coords_table"),),
    _swin_renaming,
    guess=_guess_swinv2,
    cfg=OF_IMAGENET,
)


def _maxvit_renaming(shapes: Shapes) -> Renaming:
    reason = "torchvision's MaxViT has a convolution in the first shortcut, where timm's has none"
    return Renaming({}, refused={"blocks": reason, "stem": reason})


TORCHVISION_MAXVIT = Family(
    "MaxViT of torchvision",
    (("blocks.0.layers.0.layers.MBconv.proj.1.weight",),),
    _maxvit_renaming,
)
