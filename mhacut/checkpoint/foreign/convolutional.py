"""PVTv2, LeViT and MobileViT of transformers."""

from __future__ import annotations

from torch import Tensor

from mhacut.checkpoint.foreign.config import Config
from mhacut.checkpoint.foreign.family import Built, Family, Names, Shapes, move
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


_PVT_BLOCK = "encoder.layers.*.blocks.*"
_PVT_SIGN = "encoder.layers.0.blocks.0.mlp.dwconv.dwconv.weight"
PVT_V2 = Family(
    "PVTv2 of transformers",
    {
        "encoder.layers.0.patch_embedding.proj": "patch_embed.proj",
        "encoder.layers.0.patch_embedding.layer_norm": "patch_embed.norm",
        "encoder.layers.*.patch_embedding.proj": "stages.*.downsample.proj",
        "encoder.layers.*.patch_embedding.layer_norm": "stages.*.downsample.norm",
        f"{_PVT_BLOCK}.attention.query": "stages.*.blocks.*.attn.q",
        f"{_PVT_BLOCK}.attention.key": "stages.*.blocks.*.attn.kv#0",
        f"{_PVT_BLOCK}.attention.value": "stages.*.blocks.*.attn.kv#1",
        f"{_PVT_BLOCK}.attention.proj": "stages.*.blocks.*.attn.proj",
        f"{_PVT_BLOCK}.attention.spatial_reduction": "stages.*.blocks.*.attn.sr",
        f"{_PVT_BLOCK}.attention.layer_norm": "stages.*.blocks.*.attn.norm",
        f"{_PVT_BLOCK}.layer_norm_1": "stages.*.blocks.*.norm1",
        f"{_PVT_BLOCK}.layer_norm_2": "stages.*.blocks.*.norm2",
        f"{_PVT_BLOCK}.mlp.dense1": "stages.*.blocks.*.mlp.fc1",
        f"{_PVT_BLOCK}.mlp.dwconv.dwconv": "stages.*.blocks.*.mlp.dwconv",
        f"{_PVT_BLOCK}.mlp.dense2": "stages.*.blocks.*.mlp.fc2",
        "encoder.layers.*.layer_norm": "stages.*.norm",
        "classifier": "head",
    },
    signs=(("encoder.layers.0.patch_embedding.proj.weight", _PVT_SIGN),),
    prefixes=("pvt_v2.",),
    model_types=("pvt_v2",),
    build=_build_pvt,
)


def _with_parts(names: dict[str, str], parts: dict[str, str]) -> Names:
    """Return the names of the parts of each layer, a matrix and a norm."""
    return {
        source + part: target + timms for source, target in names.items() for part, timms in parts.items()
    }


_MAX_LEVIT_BLOCKS = 16
_LEVIT_LAYERS = "encoder.stages.*.layers"


def _levit_names() -> Names:
    """Return the table of LeViT, whose layers of attention and MLPs share one list in each stage."""
    with_norm = {
        **{f"patch_embeddings.embedding_layer_{n}": f"stem.conv{n}" for n in range(1, 5)},
        "classifier": "head",
        "classifier_distill": "head_dist",
    }
    names: dict[str, str] = {}
    for block in range(_MAX_LEVIT_BLOCKS):
        attention, mlp = f"{_LEVIT_LAYERS}.{2 * block}", f"{_LEVIT_LAYERS}.{2 * block + 1}"
        target = f"stages.*.blocks.{block}"
        with_norm[f"{attention}.module.queries_keys_values"] = f"{target}.attn.qkv"
        with_norm[f"{attention}.module.projection"] = f"{target}.attn.proj.ln"
        with_norm[f"{mlp}.module.linear_up"] = f"{target}.mlp.ln1"
        with_norm[f"{mlp}.module.linear_down"] = f"{target}.mlp.ln2"
        names[f"{attention}.module.attention_biases"] = f"{target}.attn.attention_biases"
        # The last attention of a stage makes its grid smaller; in timm the next stage begins with it.
        shrinking = f"{target}.attn_downsample"
        with_norm[f"{attention}.queries"] = f"{shrinking}.q.ln"
        with_norm[f"{attention}.keys_values"] = f"{shrinking}.kv"
        with_norm[f"{attention}.projection"] = f"{shrinking}.proj.ln"
        names[f"{attention}.attention_biases"] = f"{shrinking}.attention_biases"
    parts = {".linear": ".linear", ".convolution": ".linear", ".batch_norm": ".bn"}
    return {**_with_parts(with_norm, parts), **names}


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


LEVIT = Family(
    "LeViT of transformers",
    _levit_names(),
    signs=(("encoder.stages.0.layers.0.module.queries_keys_values.linear.weight",),),
    prefixes=("levit.",),
    finish=_finish_levit,
    model_types=("levit",),
    build=_build_levit,
    stem="stem.conv1.linear.weight",
)

_MOBILE_SIZES: dict[tuple[int, ...], str] = {
    (64, 16, 24, 48, 64, 80, 320): "mobilevit_xxs",
    (96, 32, 48, 64, 80, 96, 384): "mobilevit_xs",
    (144, 32, 64, 96, 128, 160, 640): "mobilevit_s",
}
"""timm's names, by the width of the first transformer and the widths of the convolutions."""
_INVERTED = {"expand_1x1": "conv1_1x1", "conv_3x3": "conv2_kxk", "reduce_1x1": "conv3_1x1"}
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


MOBILEVIT = Family(
    "MobileViT of transformers",
    {
        "encoder.layer.*.conv_1x1.convolution": "stages.*.1.conv_1x1",
        **_with_parts(
            {
                "conv_stem": "stem",
                "conv_1x1_exp": "final_conv",
                **{
                    f"encoder.layer.*.layer.*.{one}": f"stages.*.*.{timms}"
                    for one, timms in _INVERTED.items()
                },
                **{
                    f"encoder.layer.*.downsampling_layer.{one}": f"stages.*.0.{to}"
                    for one, to in _INVERTED.items()
                },
                "encoder.layer.*.conv_kxk": "stages.*.1.conv_kxk",
                "encoder.layer.*.conv_projection": "stages.*.1.conv_proj",
                "encoder.layer.*.fusion": "stages.*.1.conv_fusion",
            },
            {".convolution": ".conv", ".normalization": ".bn"},
        ),
        **{
            f"{_MOBILE_LAYER}.attention.attention.{part}": f"{_MOBILE_BLOCK}.attn.qkv#{number}"
            for number, part in enumerate(("query", "key", "value"))
        },
        f"{_MOBILE_LAYER}.attention.output.dense": f"{_MOBILE_BLOCK}.attn.proj",
        f"{_MOBILE_LAYER}.layernorm_before": f"{_MOBILE_BLOCK}.norm1",
        f"{_MOBILE_LAYER}.layernorm_after": f"{_MOBILE_BLOCK}.norm2",
        f"{_MOBILE_LAYER}.intermediate.dense": f"{_MOBILE_BLOCK}.mlp.fc1",
        f"{_MOBILE_LAYER}.output.dense": f"{_MOBILE_BLOCK}.mlp.fc2",
        "encoder.layer.*.layernorm": "stages.*.1.norm",
        "classifier": "head.fc",
    },
    signs=(("conv_1x1_exp.convolution.weight", "encoder.layer.2.conv_kxk.convolution.weight"),),
    prefixes=("mobilevit.",),
    model_types=("mobilevit",),
    build=_build_mobilevit,
    stem="stem.conv.weight",
)
