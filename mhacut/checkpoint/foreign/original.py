"""Files of the repositories in which the models were published, where timm changed some of the names.

Most of their tensors have timm's names. The tables hold the others.
"""

from __future__ import annotations

import re

from torch import Tensor

from mhacut.checkpoint.foreign.family import Family, move
from mhacut.checkpoint.foreign.images import OF_IMAGENET

_PRETRAINING = {
    "mask_token": "",
    "masked_embed": "",
    "local_cls_norm": "the norm of small crops",
    **{
        f"decoder_{name}": "the decoder of the pretraining"
        for name in ("embed", "pos_embed", "blocks", "norm", "pred")
    },
}
_STAGES = range(8)
_THIRDS = ("q", "k", "v")


def _finish_dinov2(tensors: dict[str, Tensor]) -> None:
    """Where there are registers, timm adds no position to the class token."""
    if "reg_token" in tensors:
        positions = tensors["pos_embed"]
        tensors["cls_token"] = tensors["cls_token"] + positions[:, :1].to(tensors["cls_token"].dtype)
        tensors["pos_embed"] = positions[:, 1:].clone()


def _finish_swin(tensors: dict[str, Tensor]) -> None:
    """A stage ends with its downsampling there; in timm the next stage begins with it."""
    if "layers.0.downsample.reduction.weight" in tensors:
        for stage in reversed(_STAGES):
            move(tensors, f"layers.{stage}.downsample.", f"layers.{stage + 1}.downsample.")
        if "head.weight" in tensors:
            move(tensors, "head.", "head.fc.")


def _finish_eva02(tensors: dict[str, Tensor]) -> None:
    """Biases of queries and values are those of their layers, where each has its own."""
    if "blocks.0.attn.q_proj.weight" in tensors:
        for name in [name for name in tensors if re.fullmatch(r"blocks\.\d+\.attn\.[qv]_bias", name)]:
            tensors[name.replace("_bias", "_proj.bias")] = tensors.pop(name)


DINOV3_ORIGINAL = Family(
    "DINOv3 of its authors",
    {
        "storage_tokens": "reg_token",
        "blocks.*.ls1.gamma": "blocks.*.gamma_1",
        "blocks.*.ls2.gamma": "blocks.*.gamma_2",
        "blocks.*.mlp.w1": "blocks.*.mlp.fc1_g",
        "blocks.*.mlp.w2": "blocks.*.mlp.fc1_x",
        "blocks.*.mlp.w3": "blocks.*.mlp.fc2",
        # The keys' biases count for nothing, and timm keeps the others apart.
        "blocks.*.attn.qkv.bias": ("blocks.*.attn.q_bias", "", "blocks.*.attn.v_bias"),
    },
    signs=(("storage_tokens", "blocks.0.ls1.gamma"),),
    others=True,
    left_out=_PRETRAINING,
)
DINOV2_ORIGINAL = Family(
    "DINOv2 of its authors",
    {
        "register_tokens": "reg_token",
        "blocks.*.mlp.w12": "blocks.*.mlp.fc1",
        "blocks.*.mlp.w3": "blocks.*.mlp.fc2",
        # Training shards blocks in chunks, whose number stands before the block's.
        "blocks.*.*.mlp.w12": "blocks.{1}.mlp.fc1",
        "blocks.*.*.mlp.w3": "blocks.{1}.mlp.fc2",
        "blocks.*.*": "blocks.{1}",
    },
    signs=(
        ("mask_token", "blocks.0.ls1.gamma"),
        ("mask_token", "blocks.0.0.ls1.gamma"),
        ("register_tokens", "blocks.0.ls1.gamma"),
        ("blocks.0.mlp.w12.weight", "blocks.0.ls1.gamma"),
    ),
    others=True,
    left_out=_PRETRAINING,
    finish=_finish_dinov2,
)
PRETRAINED_VIT = Family(
    "ViT of MAE, iBOT and their like",
    {},
    signs=(
        ("decoder_blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.weight"),
        ("masked_embed", "blocks.0.attn.qkv.weight"),
    ),
    others=True,
    left_out=_PRETRAINING,
    cfg=OF_IMAGENET,
)
DEIT3_ORIGINAL = Family(
    "DeiT III of its authors",
    {"blocks.*.gamma_1": "blocks.*.ls1.gamma", "blocks.*.gamma_2": "blocks.*.ls2.gamma"},
    signs=(("blocks.0.gamma_1", "blocks.0.attn.qkv.weight"),),
    others=True,
    named="deit3_",  # timm's ViTs with rotary and absolute positions have these names and shapes
)
EVA02_ORIGINAL = Family(
    "EVA-02 of its authors",
    {
        "blocks.*.mlp.w12": "blocks.*.mlp.fc1",
        "blocks.*.mlp.w1": "blocks.*.mlp.fc1_g",
        "blocks.*.mlp.w2": "blocks.*.mlp.fc1_x",
        "blocks.*.mlp.w3": "blocks.*.mlp.fc2",
        "blocks.*.mlp.ffn_ln": "blocks.*.mlp.norm",
        "blocks.*.attn.inner_attn_ln": "blocks.*.attn.norm",
    },
    signs=(
        ("blocks.0.mlp.w1.weight", "blocks.0.mlp.w3.weight"),
        ("blocks.0.mlp.w12.weight", "blocks.0.mlp.w3.weight"),
    ),
    others=True,
    left_out=_PRETRAINING,
    finish=_finish_eva02,
)
SWIN_ORIGINAL = Family(
    "Swin of its authors",
    {},
    signs=(("layers.0.downsample.reduction.weight",), ("layers.0.blocks.0.attn.relative_position_index",)),
    unlike=("layers.0.blocks.0.attn.dwc.weight",),  # FLatten Transformers keep these names
    others=True,
    left_out=_PRETRAINING,
    finish=_finish_swin,
)
PVT_V2_ORIGINAL = Family(
    "PVTv2 of its authors",
    {
        **{f"block{n + 1}.*.mlp.dwconv.dwconv": f"stages.{n}.blocks.*.mlp.dwconv" for n in _STAGES},
        **{f"block{n + 1}.*": f"stages.{n}.blocks.*" for n in _STAGES},
        **{f"norm{n + 1}": f"stages.{n}.norm" for n in _STAGES},
        "patch_embed1": "patch_embed",
        **{f"patch_embed{n + 1}": f"stages.{n}.downsample" for n in _STAGES[1:]},
    },
    signs=(("block1.0.attn.q.weight", "patch_embed1.proj.weight"),),
    unlike=("block1.0.attn.dwc.weight",),
    others=True,
)
XCIT_ORIGINAL = Family(
    "XCiT of its authors",
    {
        "pos_embeder": "pos_embed",
        # timm computes the queries of the class token alone.
        **{
            f"cls_attn_blocks.*.attn.qkv.{kind}": (
                *(f"cls_attn_blocks.*.attn.{part}.{kind}" for part in _THIRDS),
            )
            for kind in ("weight", "bias")
        },
    },
    signs=(("pos_embeder.token_projection.weight",),),
    others=True,
)
BUFFERS = Family(
    "an older timm, or its authors",
    {},
    signs=(("attn.attention_bias_idxs",), ("blocks.0.attn.relative_position_index",)),
    unlike=("layers.0.blocks.0.norm1.weight",),  # Swin, and FLatten Transformers
    others=True,
    left_out=_PRETRAINING,
)
"""LeViT and BEiT, whose files hold buffers besides timm's names."""
SAM_ORIGINAL = Family(
    "Segment Anything of its authors",
    {"blocks.*.mlp.lin1": "blocks.*.mlp.fc1", "blocks.*.mlp.lin2": "blocks.*.mlp.fc2"},
    signs=(("image_encoder.blocks.0.mlp.lin1.weight",),),
    prefixes=("image_encoder.",),
    others=True,
    left_out={"prompt_encoder": "the encoder of prompts", "mask_decoder": "the decoder of masks"},
)

ORIGINAL = (
    *(DINOV3_ORIGINAL, DINOV2_ORIGINAL, PRETRAINED_VIT, DEIT3_ORIGINAL, EVA02_ORIGINAL),
    *(SWIN_ORIGINAL, BUFFERS, PVT_V2_ORIGINAL, XCIT_ORIGINAL, SAM_ORIGINAL),
)
