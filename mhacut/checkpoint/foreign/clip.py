"""Image towers of CLIP, SigLIP and SigLIP 2 of transformers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mhacut.checkpoint.foreign.config import Config
from mhacut.checkpoint.foreign.family import Built, Family, Shapes, check_eps
from mhacut.checkpoint.foreign.rename import Renaming
from mhacut.checkpoint.foreign.vit import size_name, vit_args, vit_name
from mhacut.errors import CheckpointError

_TOWER = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.patch_embedding": "patch_embed.proj",
    "embeddings.position_embedding.weight": "pos_embed",
    "pre_layrnorm": "norm_pre",
    "encoder.layers.*.layer_norm1": "blocks.*.norm1",
    "encoder.layers.*.layer_norm2": "blocks.*.norm2",
    "encoder.layers.*.self_attn.q_proj": "blocks.*.attn.qkv#0",
    "encoder.layers.*.self_attn.k_proj": "blocks.*.attn.qkv#1",
    "encoder.layers.*.self_attn.v_proj": "blocks.*.attn.qkv#2",
    "encoder.layers.*.self_attn.out_proj": "blocks.*.attn.proj",
    "encoder.layers.*.mlp": "blocks.*.mlp",
    "post_layernorm": "norm",
    "classifier": "head",
}
_NOT_THE_TOWER = {
    "text_model": "the text tower",
    "text_projection": "the text tower",
    "logit_scale": "",
    "logit_bias": "",
    "embeddings.position_ids": "",
}


def _clip_renaming(shapes: Shapes) -> Renaming:
    left_out = dict(_NOT_THE_TOWER)
    if "classifier.weight" in shapes:  # it reads the patches as the last block leaves them
        left_out |= {"post_layernorm": "the norm that the classifier does not read", "visual_projection": ""}
    return Renaming(
        {**_TOWER, "visual_projection": "head"}, left_out, prefixes=("vision_model.",), finish=finish_clip
    )


def finish_clip(tensors: dict[str, Tensor]) -> None:
    """Reshape class token and positions as timm has them, in place; give a projection a bias of zeros."""
    tensors["cls_token"] = tensors["cls_token"].reshape(1, 1, -1)
    tensors["pos_embed"] = tensors["pos_embed"].unsqueeze(0)
    head = tensors.get("head.weight")
    if head is not None and "head.bias" not in tensors:
        tensors["head.bias"] = torch.zeros(head.shape[0], dtype=head.dtype, device=head.device)


def _build_clip(config: Config, shapes: Shapes) -> Built:
    check_eps(config, 1e-5, 1e-5)
    args = vit_args(config, "quick_gelu", patch=32)
    if "norm.weight" not in shapes:
        args |= {"global_pool": "avg", "final_norm": False}
    suffix = "_clip_quickgelu" if args.get("act_layer") == "quick_gelu" else "_clip"
    args.setdefault("act_layer", "gelu")
    return Built(vit_name(size_name(args), args["patch_size"], args["img_size"], suffix), args)


CLIP = Family(
    "image tower of CLIP of transformers",
    (("pre_layrnorm.weight", "encoder.layers.0.self_attn.q_proj.weight"),),
    _clip_renaming,
    _build_clip,
    model_types=("clip", "clip_vision_model"),
)


def _siglip_renaming(shapes: Shapes) -> Renaming:
    names = {
        **_TOWER,
        "head.probe": "attn_pool.latent",
        "head.attention.in_proj_weight": "attn_pool.qkv.weight",
        "head.attention.in_proj_bias": "attn_pool.qkv.bias",
        "head.attention.out_proj": "attn_pool.proj",
        "head.layernorm": "attn_pool.norm",
        "head.mlp": "attn_pool.mlp",
    }
    left_out = dict(_NOT_THE_TOWER)
    if "classifier.weight" in shapes:
        left_out["head"] = "the pooling head that the classifier does not read"
    return Renaming(names, left_out, prefixes=("vision_model.",), finish=_finish_siglip)


def _finish_siglip(tensors: dict[str, Tensor]) -> None:
    """Split the pooling head's projections, and make a convolution of SigLIP 2's linear patch embedding."""
    tensors["pos_embed"] = tensors["pos_embed"].unsqueeze(0)
    for kind in ("weight", "bias"):
        joined = tensors.pop(f"attn_pool.qkv.{kind}", None)
        if joined is not None:
            width = joined.shape[0] // 3
            tensors[f"attn_pool.q.{kind}"] = joined[:width].clone()
            tensors[f"attn_pool.kv.{kind}"] = joined[width:].clone()
    patches = tensors["patch_embed.proj.weight"]
    if patches.dim() == 2:  # (D, patch * patch * 3)
        side = math.isqrt(patches.shape[1] // 3)
        square = patches.reshape(patches.shape[0], side, side, 3)
        tensors["patch_embed.proj.weight"] = square.permute(0, 3, 1, 2).contiguous()


def _build_siglip(config: Config, shapes: Shapes) -> Built:
    check_eps(config, 1e-6, 1e-6)
    args: dict[str, Any] = vit_args(config, "gelu_pytorch_tanh")
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
    args["class_token"] = False
    pooling = "attn_pool.latent" in shapes
    args["global_pool"] = "map" if pooling else "avg"
    args["fc_norm"] = False
    return Built(vit_name(size_name(args), args["patch_size"], args["img_size"], "_siglip"), args)


SIGLIP = Family(
    "image tower of SigLIP of transformers",
    (("embeddings.position_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight"),),
    _siglip_renaming,
    _build_siglip,
    model_types=("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model"),
    unlike=("pre_layrnorm.weight",),
)
