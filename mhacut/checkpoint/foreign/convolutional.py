"""PVTv2, LeViT and MobileViT of transformers."""

from __future__ import annotations

import re

from mhacut.checkpoint.foreign.config import Config
from mhacut.checkpoint.foreign.family import Built, Family, Shapes, check_eps
from mhacut.checkpoint.foreign.rename import Renaming
from mhacut.errors import CheckpointError

_PVT_NAMES = {
    "encoder.layers.0.patch_embedding.proj": "patch_embed.proj",
    "encoder.layers.0.patch_embedding.layer_norm": "patch_embed.norm",
    "encoder.layers.*.patch_embedding.proj": "stages.*.downsample.proj",
    "encoder.layers.*.patch_embedding.layer_norm": "stages.*.downsample.norm",
    "encoder.layers.*.blocks.*.attention.query": "stages.*.blocks.*.attn.q",
    "encoder.layers.*.blocks.*.attention.key": "stages.*.blocks.*.attn.kv#0",
    "encoder.layers.*.blocks.*.attention.value": "stages.*.blocks.*.attn.kv#1",
    "encoder.layers.*.blocks.*.attention.proj": "stages.*.blocks.*.attn.proj",
    "encoder.layers.*.blocks.*.attention.spatial_reduction": "stages.*.blocks.*.attn.sr",
    "encoder.layers.*.blocks.*.attention.layer_norm": "stages.*.blocks.*.attn.norm",
    "encoder.layers.*.blocks.*.layer_norm_1": "stages.*.blocks.*.norm1",
    "encoder.layers.*.blocks.*.layer_norm_2": "stages.*.blocks.*.norm2",
    "encoder.layers.*.blocks.*.mlp.dense1": "stages.*.blocks.*.mlp.fc1",
    "encoder.layers.*.blocks.*.mlp.dwconv.dwconv": "stages.*.blocks.*.mlp.dwconv",
    "encoder.layers.*.blocks.*.mlp.dense2": "stages.*.blocks.*.mlp.fc2",
    "encoder.layers.*.layer_norm": "stages.*.norm",
    "classifier": "head",
}
_PVT_SIZES = {
    (32, 2, 2): "b0",
    (64, 2, 2): "b1",
    (64, 4, 6): "b2",
    (64, 4, 18): "b3",
    (64, 8, 27): "b4",
    (64, 6, 40): "b5",
}
"""Ends of timm's names, by the width of the first stage and the depths of the second and third."""


def _pvt_renaming(shapes: Shapes) -> Renaming:
    return Renaming(_PVT_NAMES, prefixes=("pvt_v2.",))


def _build_pvt(config: Config, shapes: Shapes) -> Built:
    check_eps(config, 1e-6, 1e-6)
    fixed = "timm's PVTv2 has one value only"
    config.require("hidden_act", "gelu", reason=fixed)
    config.require("patch_sizes", [7, 3, 3, 3], reason=fixed)
    config.require("strides", [4, 2, 2, 2], reason=fixed)
    config.require("num_encoder_blocks", 4, reason=fixed)
    config.require("linear_attention", False, reason="mhacut has not compared it with timm's")
    widths, depths = config.sizes("hidden_sizes", (32, 64, 160, 256)), config.sizes("depths", (2, 2, 2, 2))
    args = {
        "in_chans": config.size("num_channels", 3),
        "embed_dims": widths,
        "depths": depths,
        "num_heads": config.sizes("num_attention_heads", (1, 2, 5, 8)),
        "sr_ratios": config.sizes("sr_ratios", (8, 4, 2, 1)),
        "mlp_ratios": config.sizes("mlp_ratios", (8, 8, 4, 4)),
        "qkv_bias": config.flag("qkv_bias", True),
    }
    for name in ("embed_dims", "depths", "num_heads", "sr_ratios", "mlp_ratios"):
        if len(args[name]) != 4:  # type: ignore[arg-type]
            raise CheckpointError(f"{config.where}: expected four stages, found {name} {args[name]}")
    size = _PVT_SIZES.get((widths[0], depths[1], depths[2]), "b0")
    return Built(f"pvt_v2_{size}", args, side=config.side("image_size", 224))


PVT_V2 = Family(
    "PVTv2 of transformers",
    (("encoder.layers.0.patch_embedding.proj.weight", "encoder.layers.0.blocks.0.mlp.dwconv.dwconv.weight"),),
    _pvt_renaming,
    _build_pvt,
    model_types=("pvt_v2",),
)

_LINEAR = {".linear": ".linear", ".batch_norm": ".bn"}
"""Parts of a linear layer with a batch norm, by their names in timm."""
_MAX_LEVIT_BLOCKS = 16
_SUBSAMPLE = re.compile(r"(?:levit\.)?encoder\.stages\.(\d{1,2})\.layers\.(\d{1,3})\.queries\.linear\.weight")


def _levit_renaming(shapes: Shapes) -> Renaming:
    names: dict[str, str] = {}

    def add(source: str, target: str) -> None:
        for part, timms in _LINEAR.items():
            names[source + part] = target + timms

    for n in range(1, 5):
        names[f"patch_embeddings.embedding_layer_{n}.convolution"] = f"stem.conv{n}.linear"
        names[f"patch_embeddings.embedding_layer_{n}.batch_norm"] = f"stem.conv{n}.bn"
    for stage, layer in map(re.Match.groups, filter(None, map(_SUBSAMPLE.fullmatch, shapes))):
        source, target = f"encoder.stages.{stage}.layers", f"stages.{int(stage) + 1}.downsample"
        add(f"{source}.{layer}.queries", f"{target}.attn_downsample.q.ln")
        add(f"{source}.{layer}.keys_values", f"{target}.attn_downsample.kv")
        add(f"{source}.{layer}.projection", f"{target}.attn_downsample.proj.ln")
        names[f"{source}.{layer}.attention_biases"] = f"{target}.attn_downsample.attention_biases"
        add(f"{source}.{int(layer) + 1}.module.linear_up", f"{target}.mlp.ln1")
        add(f"{source}.{int(layer) + 1}.module.linear_down", f"{target}.mlp.ln2")
    for block in range(_MAX_LEVIT_BLOCKS):
        source, target = "encoder.stages.*.layers", f"stages.*.blocks.{block}"
        add(f"{source}.{2 * block}.module.queries_keys_values", f"{target}.attn.qkv")
        add(f"{source}.{2 * block}.module.projection", f"{target}.attn.proj.ln")
        names[f"{source}.{2 * block}.module.attention_biases"] = f"{target}.attn.attention_biases"
        add(f"{source}.{2 * block + 1}.module.linear_up", f"{target}.mlp.ln1")
        add(f"{source}.{2 * block + 1}.module.linear_down", f"{target}.mlp.ln2")
    add("classifier", "head")
    add("classifier_distill", "head_dist")
    left_out = {"encoder.stages.*.layers.*.module.attention_bias_idxs": ""}
    left_out["encoder.stages.*.layers.*.attention_bias_idxs"] = ""
    return Renaming(names, left_out, prefixes=("levit.",))


def _build_levit(config: Config, shapes: Shapes) -> Built:
    fixed = "timm's LeViT has one value only"
    for name, value in {"kernel_size": 3, "stride": 2, "padding": 1, "patch_size": 16}.items():
        config.require(name, value, reason=fixed)
    widths = config.sizes("hidden_sizes", (128, 256, 384))
    args = {
        "img_size": config.side("image_size", 224),
        "in_chans": config.size("num_channels", 3),
        "embed_dim": widths,
        "depth": config.sizes("depths", (4, 4, 4)),
        "num_heads": config.sizes("num_attention_heads", (4, 8, 12)),
        "key_dim": config.sizes("key_dim", (16, 16, 16))[0],
        "attn_ratio": config.sizes("attention_ratio", (2, 2, 2)),
        "mlp_ratio": config.sizes("mlp_ratio", (2, 2, 2)),
        "distilled": "head_dist.linear.weight" in shapes,
    }
    if any(width != args["key_dim"] for width in config.sizes("key_dim", (16, 16, 16))):
        raise config.fault("key_dim", "one number for all stages, as timm's LeViT has it")
    depths = config.sizes("depths", (4, 4, 4))
    if max(depths) > _MAX_LEVIT_BLOCKS or len(depths) != len(widths):
        raise config.fault("depths", f"{len(widths)} numbers of at most {_MAX_LEVIT_BLOCKS}")
    name = {128: "levit_128", 192: "levit_192", 256: "levit_256", 384: "levit_384"}.get(
        widths[0], "levit_128"
    )
    return Built("levit_128s" if depths == [2, 3, 4] and widths[0] == 128 else name, args)


LEVIT = Family(
    "LeViT of transformers",
    (("encoder.stages.0.layers.0.module.queries_keys_values.linear.weight",),),
    _levit_renaming,
    _build_levit,
    model_types=("levit",),
    stem="stem.conv1.linear.weight",
)

_MOBILE_CONV = {".convolution": ".conv", ".normalization": ".bn"}
_MOBILE_SIZES = {
    (64, 16, 24, 48, 64, 80, 320): "mobilevit_xxs",
    (96, 32, 48, 64, 80, 96, 384): "mobilevit_xs",
    (144, 32, 64, 96, 128, 160, 640): "mobilevit_s",
}
"""timm's names, by the width of the first transformer and the widths of the convolutions."""


def _mobilevit_renaming(shapes: Shapes) -> Renaming:
    names: dict[str, str] = {}

    def add(source: str, target: str) -> None:
        for part, timms in _MOBILE_CONV.items():
            names[source + part] = target + timms

    add("conv_stem", "stem")
    add("conv_1x1_exp", "final_conv")
    inner = {"expand_1x1": "conv1_1x1", "conv_3x3": "conv2_kxk", "reduce_1x1": "conv3_1x1"}
    for source, target in inner.items():
        add(f"encoder.layer.*.layer.*.{source}", f"stages.*.*.{target}")
        add(f"encoder.layer.*.downsampling_layer.{source}", f"stages.*.0.{target}")
    layer = "encoder.layer.*"
    names[f"{layer}.conv_1x1.convolution"] = "stages.*.1.conv_1x1"
    for source, target in {
        "conv_kxk": "conv_kxk",
        "conv_projection": "conv_proj",
        "fusion": "conv_fusion",
    }.items():
        add(f"{layer}.{source}", f"stages.*.1.{target}")
    source, target = f"{layer}.transformer.layer.*", "stages.*.1.transformer.*"
    names |= {
        f"{source}.attention.attention.query": f"{target}.attn.qkv#0",
        f"{source}.attention.attention.key": f"{target}.attn.qkv#1",
        f"{source}.attention.attention.value": f"{target}.attn.qkv#2",
        f"{source}.attention.output.dense": f"{target}.attn.proj",
        f"{source}.layernorm_before": f"{target}.norm1",
        f"{source}.layernorm_after": f"{target}.norm2",
        f"{source}.intermediate.dense": f"{target}.mlp.fc1",
        f"{source}.output.dense": f"{target}.mlp.fc2",
        f"{layer}.layernorm": "stages.*.1.norm",
        "classifier": "head.fc",
    }
    return Renaming(names, prefixes=("mobilevit.",))


def _build_mobilevit(config: Config, shapes: Shapes) -> Built:
    check_eps(config, 1e-5, 1e-5)
    fixed = "timm's MobileViT has one value only"
    fixed_values = {"patch_size": 2, "num_attention_heads": 4, "conv_kernel_size": 3, "mlp_ratio": 2.0}
    for name, value in {**fixed_values, "hidden_act": "silu", "output_stride": 32, "qkv_bias": True}.items():
        config.require(name, value, reason=fixed)
    neck = config.sizes("neck_hidden_sizes", (16, 32, 64, 96, 128, 160, 640))
    key = (config.sizes("hidden_sizes", (144, 192, 240))[0], *neck[1:])
    if key not in _MOBILE_SIZES:
        raise config.fault("neck_hidden_sizes", "those of MobileViT XXS, XS or S, which timm has")
    return Built(
        _MOBILE_SIZES[key],
        {"in_chans": config.size("num_channels", 3)},
        side=config.side("image_size", 256),
    )


MOBILEVIT = Family(
    "MobileViT of transformers",
    (("conv_1x1_exp.convolution.weight", "encoder.layer.2.conv_kxk.convolution.weight"),),
    _mobilevit_renaming,
    _build_mobilevit,
    model_types=("mobilevit",),
    stem="stem.conv.weight",
)
