"""Swin and Swin V2 of transformers."""

from __future__ import annotations

from typing import Any

from mhacut.checkpoint.build import known_model
from mhacut.checkpoint.foreign.config import Config
from mhacut.checkpoint.foreign.family import Built, Family, Shapes, check_eps
from mhacut.checkpoint.foreign.rename import Renaming
from mhacut.errors import CheckpointError

_MAX_STAGES = 8
_SIZES = {(96, 6): "tiny", (96, 18): "small", (128, 18): "base", (192, 18): "large"}
"""Sizes in timm's names, by the width of the first stage and the depth of the third."""
_ATTENTION = "encoder.layers.*.blocks.*.attention.self"
_MODULE = "encoder.layers.*.blocks.*.attention"
"""The same module under the names of transformers 5, which differ from those in its files."""
_BLOCK = "layers.*.blocks.*.attn"
_NAMES = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.norm": "patch_embed.norm",
    f"{_ATTENTION}.query.bias": f"{_BLOCK}.q_bias",
    f"{_ATTENTION}.value.bias": f"{_BLOCK}.v_bias",
    f"{_ATTENTION}.query": f"{_BLOCK}.qkv#0",
    f"{_ATTENTION}.key": f"{_BLOCK}.qkv#1",
    f"{_ATTENTION}.value": f"{_BLOCK}.qkv#2",
    f"{_ATTENTION}.relative_position_bias_table": f"{_BLOCK}.relative_position_bias_table",
    f"{_ATTENTION}.continuous_position_bias_mlp": f"{_BLOCK}.cpb_mlp",
    f"{_ATTENTION}.logit_scale": f"{_BLOCK}.logit_scale",
    f"{_MODULE}.q_proj": f"{_BLOCK}.qkv#0",
    f"{_MODULE}.k_proj": f"{_BLOCK}.qkv#1",
    f"{_MODULE}.v_proj": f"{_BLOCK}.qkv#2",
    f"{_MODULE}.o_proj": f"{_BLOCK}.proj",
    f"{_MODULE}.relative_position_bias": _BLOCK,
    "encoder.layers.*.blocks.*.mlp": "layers.*.blocks.*.mlp",
    "encoder.layers.*.blocks.*.attention.output.dense": f"{_BLOCK}.proj",
    "encoder.layers.*.blocks.*.layernorm_before": "layers.*.blocks.*.norm1",
    "encoder.layers.*.blocks.*.layernorm_after": "layers.*.blocks.*.norm2",
    "encoder.layers.*.blocks.*.intermediate.dense": "layers.*.blocks.*.mlp.fc1",
    "encoder.layers.*.blocks.*.output.dense": "layers.*.blocks.*.mlp.fc2",
    **{f"encoder.layers.{n}.downsample": f"layers.{n + 1}.downsample" for n in range(_MAX_STAGES)},
    "layernorm": "norm",
    "classifier": "head.fc",
}
"""A stage ends with its downsampling in transformers; in timm the next stage begins with it."""
_LEFT_OUT = {
    f"{_ATTENTION}.relative_position_index": "",
    f"{_ATTENTION}.relative_coords_table": "",
    f"{_MODULE}.relative_position_bias.relative_position_index": "",
    "embeddings.mask_token": "",
    "decoder": "the decoder of the pretraining",
}


def _swin_renaming(shapes: Shapes) -> Renaming:
    names = {name: target for name, target in _NAMES.items() if not target.endswith("_bias")}
    return Renaming(names, _LEFT_OUT, prefixes=("swin.",))


def _swinv2_renaming(shapes: Shapes) -> Renaming:
    return Renaming(_NAMES, _LEFT_OUT, prefixes=("swinv2.",))


def _args(config: Config) -> dict[str, Any]:
    check_eps(config, 1e-5, 1e-5)
    config.require("use_absolute_embeddings", False, reason="timm's Swin has no table of positions")
    config.require("hidden_act", "gelu", reason="timm's Swin has GELU")
    depths, heads = config.sizes("depths", (2, 2, 6, 2)), config.sizes("num_heads", (3, 6, 12, 24))
    if len(depths) != len(heads) or len(depths) > _MAX_STAGES:
        raise config.fault("num_heads", f"one number for each of {len(depths)} stages, at most {_MAX_STAGES}")
    side, patch = config.side("image_size", 224), config.side("patch_size", 4)
    _check_windows(config, side // patch, depths, config.size("window_size", 7))
    return {
        "img_size": side,
        "patch_size": patch,
        "in_chans": config.size("num_channels", 3),
        "embed_dim": config.size("embed_dim", 96),
        "depths": depths,
        "num_heads": heads,
        "window_size": config.size("window_size", 7),
        "mlp_ratio": config.number("mlp_ratio", 4.0),
        "qkv_bias": config.flag("qkv_bias", True),
    }


def _check_windows(config: Config, grid: int, depths: list[int], window: int) -> None:
    """Refuse a grid that windows do not tile: timm shifts it and then pads it, transformers pads it first."""
    for stage, depth in enumerate(depths):
        if grid > window and grid % window and depth > 1:
            raise CheckpointError(
                f"{config.where}: window_size {window} cannot be converted: the {grid}x{grid} grid of stage "
                f"{stage} is no multiple of it, and timm pads shifted windows in another order"
            )
        grid = (grid + 1) // 2


def swin_size(args: dict[str, Any]) -> str:
    """Return the size in timm's name for a Swin of this width and depth; ``tiny`` if timm has none."""
    return _SIZES.get((args["embed_dim"], args["depths"][2] if len(args["depths"]) > 2 else 0), "tiny")


def _build_swin(config: Config, shapes: Shapes) -> Built:
    args = _args(config)
    name = f"swin_{swin_size(args)}_patch4_window{args['window_size']}_{args['img_size']}"
    return Built(name if known_model(name) else "swin_tiny_patch4_window7_224", args)


def _build_swinv2(config: Config, shapes: Shapes) -> Built:
    args = _args(config)
    stages = len(args["depths"])
    windows = config.sizes("pretrained_window_sizes", (0,) * stages, least=0)
    if len(windows) < stages:
        raise config.fault("pretrained_window_sizes", f"one number for each of {stages} stages")
    args["pretrained_window_sizes"] = windows[:stages]
    name = f"swinv2_{swin_size(args)}_window{args['window_size']}_{args['img_size']}"
    return Built(name if known_model(name) else "swinv2_tiny_window8_256", args)


SWIN = Family(
    "Swin of transformers",
    (
        ("encoder.layers.0.blocks.0.attention.self.relative_position_bias_table",),
        ("encoder.layers.0.blocks.0.attention.relative_position_bias.relative_position_bias_table",),
    ),
    _swin_renaming,
    _build_swin,
    model_types=("swin",),
)
SWINV2 = Family(
    "Swin V2 of transformers",
    (("encoder.layers.0.blocks.0.attention.self.logit_scale",),),
    _swinv2_renaming,
    _build_swinv2,
    model_types=("swinv2",),
)
