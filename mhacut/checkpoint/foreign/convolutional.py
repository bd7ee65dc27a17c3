"""PVTv2, LeViT and MobileViT of transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mhacut.checkpoint.foreign.config import Config
from mhacut.checkpoint.foreign.family import Built, Shapes, move
from mhacut.errors import CheckpointError

_PVT_SIZES = {
    (32, 2, 2): "b0",
    (64, 2, 2): "b1",
    (64, 4, 6): "b2",
    (64, 4, 18): "b3",
    (64, 8, 27): "b4",
    (64, 6, 40): "b5",
}
"""Ends of timm's names, by the width of the first stage and the depths of the second and third."""


def _build_pvt(config: Config, shapes: Shapes) -> Built:
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
    return Built(f"pvt_v2_{size}", args, side=config.get("image_size", 224))


_MAX_LEVIT_BLOCKS = 16


def _finish_levit(tensors: dict[str, Tensor]) -> None:
    """Move the attention that ends a stage, and its MLP, to the beginning of the next."""
    for name in [name for name in tensors if name.endswith(".attn_downsample.q.ln.linear.weight")]:
        block = name.removesuffix("attn_downsample.q.ln.linear.weight")
        move(tensors, block, f"stages.{int(name.split('.')[1]) + 1}.downsample.")


def _build_levit(config: Config, shapes: Shapes) -> Built:
    fixed = {"kernel_size": 3, "stride": 2, "padding": 1, "patch_size": 16}
    config.require(fixed, "timm's LeViT has one value only")
    args = config.read(
        {
            "img_size": ("image_size", 224),
            "in_chans": ("num_channels", 3),
            "embed_dim": ("hidden_sizes", [128, 256, 384]),
            "depth": ("depths", [4, 4, 4]),
            "num_heads": ("num_attention_heads", [4, 8, 12]),
            "key_dim": ("key_dim", [16, 16, 16]),
            "attn_ratio": ("attention_ratio", [2, 2, 2]),
            "mlp_ratio": ("mlp_ratio", [2, 2, 2]),
        }
    )
    width, depths = args["embed_dim"][0], args["depth"]
    if len(set(args["key_dim"])) > 1:
        raise config.fault("key_dim", "one number for all stages, as timm's LeViT has it")
    if max(depths) >= _MAX_LEVIT_BLOCKS or len(depths) != len(args["embed_dim"]):
        expected = f"{len(args['embed_dim'])} numbers below {_MAX_LEVIT_BLOCKS}"
        raise config.fault("depths", expected)
    args |= {"key_dim": args["key_dim"][0], "distilled": "head_dist.linear.weight" in shapes}
    size = "128s" if (width, depths) == (128, [2, 3, 4]) else str(width)
    return Built(f"levit_{size if width in (128, 192, 256, 384) else 128}", args)


_MOBILE_SIZES: dict[tuple[int, ...], str] = {
    (64, 16, 24, 48, 64, 80, 320): "mobilevit_xxs",
    (96, 32, 48, 64, 80, 96, 384): "mobilevit_xs",
    (144, 32, 64, 96, 128, 160, 640): "mobilevit_s",
}
"""timm's names, by the width of the first transformer and the widths of the convolutions."""
_MOBILE_LAYER, _MOBILE_BLOCK = "encoder.layer.*.transformer.layer.*", "stages.*.1.transformer.*"


def _build_mobilevit(config: Config, shapes: Shapes) -> Built:
    config.require_eps(1e-5, 1e-5)
    sizes = {"patch_size": 2, "num_attention_heads": 4, "conv_kernel_size": 3, "mlp_ratio": 2.0}
    fixed = {**sizes, "hidden_act": "silu", "output_stride": 32, "qkv_bias": True}
    config.require(fixed, "timm's MobileViT has one value only")
    neck = config.get("neck_hidden_sizes", [16, 32, 64, 96, 128, 160, 640])
    architecture = _MOBILE_SIZES.get((config.get("hidden_sizes", [144, 192, 240])[0], *neck[1:]))
    if architecture is None:
        raise config.fault("neck_hidden_sizes", "those of MobileViT XXS, XS or S, which timm has")
    return Built(
        architecture, {"in_chans": config.get("num_channels", 3)}, side=config.get("image_size", 256)
    )


FUNCTIONS: dict[str, dict[str, Any]] = {
    "PVTv2 of transformers": {"build": _build_pvt},
    "LeViT of transformers": {"build": _build_levit, "finish": _finish_levit},
    "MobileViT of transformers": {"build": _build_mobilevit},
}
"""Functions of the families, by title."""
