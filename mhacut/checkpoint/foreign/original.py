"""Files of the repositories in which the models were published, where timm changed some of the names.

Most of their tensors have timm's names. The tables hold the others, and the buffers that older code saved.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from mhacut.checkpoint.foreign.family import Family, Shapes
from mhacut.checkpoint.foreign.images import OF_IMAGENET
from mhacut.checkpoint.foreign.rename import Renaming, without_numbers

_BUFFERS = re.compile(
    r"(.*\.)?(relative_position_index|relative_coords_table|attn_mask|attention_bias_idxs|bias_mask"
    r"|rope(_embed)?\.(periods|freqs_cos|freqs_sin))"
)
"""Tensors that the code computes anew from sizes."""
_PRETRAINING = {
    "mask_token": "",
    "masked_embed": "",
    "decoder_embed": "the decoder of the pretraining",
    "decoder_pos_embed": "the decoder of the pretraining",
    "decoder_blocks": "the decoder of the pretraining",
    "decoder_norm": "the decoder of the pretraining",
    "decoder_pred": "the decoder of the pretraining",
    "local_cls_norm": "the norm of small crops",
}
_STAGES = range(8)
_MOST = 64
"""Modules of a model, and kinds of buffers, that are looked for; each is compared with all names."""


def _table(
    renamed: Mapping[str, str],
    *,
    prefix: str = "",
    left_out: Mapping[str, str] | None = None,
    finish: Callable[[dict[str, Tensor]], None] | None = None,
) -> Callable[[Shapes], Renaming]:
    """Return the table of a file whose other names are timm's behind ``prefix``."""

    def renaming(shapes: Shapes) -> Renaming:
        names = [name.removeprefix(prefix) for name in shapes if name.startswith(prefix)]
        modules = {name.partition(".")[0] for name in names} - renamed.keys()
        kept = sorted(module for module in modules if re.fullmatch(r"\w+", module))
        computed = {without_numbers(name) for name in names if _BUFFERS.fullmatch(name)}
        return Renaming(
            {**renamed, **{name: name for name in kept[:_MOST]}},
            {**_PRETRAINING, **(left_out or {}), **dict.fromkeys(sorted(computed)[:_MOST], "")},
            prefixes=(prefix,),
            finish=finish,
        )

    return renaming


def _finish_dinov2(tensors: dict[str, Tensor]) -> None:
    """Where there are registers, timm adds no position to the class token."""
    if "reg_token" in tensors:
        positions = tensors["pos_embed"]
        tensors["cls_token"] = tensors["cls_token"] + positions[:, :1].to(tensors["cls_token"].dtype)
        tensors["pos_embed"] = positions[:, 1:].clone()


def _finish_dinov3(tensors: dict[str, Tensor]) -> None:
    """The keys' biases count for nothing, and timm keeps the others apart."""
    for name in _named(tensors, r"blocks\.\d+\.attn\.qkv\.bias"):
        q, _, v = tensors.pop(name).chunk(3)
        tensors[name.replace("qkv.bias", "q_bias")] = q.clone()
        tensors[name.replace("qkv.bias", "v_bias")] = v.clone()


def _finish_xcit(tensors: dict[str, Tensor]) -> None:
    """Split the queries, keys and values of the class token's attention, which timm computes apart."""
    for name in _named(tensors, r"cls_attn_blocks\.\d+\.attn\.qkv\.(weight|bias)"):
        for part, rows in zip("qkv", tensors.pop(name).chunk(3), strict=True):
            tensors[name.replace("qkv", part)] = rows.clone()


def _named(tensors: Iterable[str], pattern: str) -> list[str]:
    return [name for name in tensors if re.fullmatch(pattern, name)]


_GATED = {"blocks.*.mlp.w12": "blocks.*.mlp.fc1", "blocks.*.mlp.w3": "blocks.*.mlp.fc2"}
_CHUNKED = {
    "blocks.*.*.mlp.w12": "blocks.{1}.mlp.fc1",
    "blocks.*.*.mlp.w3": "blocks.{1}.mlp.fc2",
    "blocks.*.*": "blocks.{1}",
}
"""Training of DINOv2 shards blocks in chunks, whose number stands before the block's."""
_SCALES = {"blocks.*.ls1.gamma": "blocks.*.gamma_1", "blocks.*.ls2.gamma": "blocks.*.gamma_2"}

DINOV3_ORIGINAL = Family(
    "DINOv3 of its authors",
    (("storage_tokens", "blocks.0.ls1.gamma"),),
    _table(
        {
            "storage_tokens": "reg_token",
            **_SCALES,
            "blocks.*.mlp.w1": "blocks.*.mlp.fc1_g",
            "blocks.*.mlp.w2": "blocks.*.mlp.fc1_x",
            "blocks.*.mlp.w3": "blocks.*.mlp.fc2",
        },
        finish=_finish_dinov3,
    ),
)
DINOV2_ORIGINAL = Family(
    "DINOv2 of its authors",
    (
        ("mask_token", "blocks.0.ls1.gamma"),
        ("mask_token", "blocks.0.0.ls1.gamma"),
        ("register_tokens", "blocks.0.ls1.gamma"),
        ("blocks.0.mlp.w12.weight", "blocks.0.ls1.gamma"),
    ),
    _table({"register_tokens": "reg_token", **_GATED, **_CHUNKED}, finish=_finish_dinov2),
)
PRETRAINED_VIT = Family(
    "ViT of MAE, iBOT and their like",
    (
        ("decoder_blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.weight"),
        ("masked_embed", "blocks.0.attn.qkv.weight"),
    ),
    _table({}),
    cfg=OF_IMAGENET,
)
DEIT3_ORIGINAL = Family(
    "DeiT III of its authors",
    (("blocks.0.gamma_1", "blocks.0.attn.qkv.weight"),),
    _table({"blocks.*.gamma_1": "blocks.*.ls1.gamma", "blocks.*.gamma_2": "blocks.*.ls2.gamma"}),
    named="deit3_",  # timm's ViTs with rotary and absolute positions have these names and shapes
)
EVA02_ORIGINAL = Family(
    "EVA-02 of its authors",
    (
        ("blocks.0.mlp.w1.weight", "blocks.0.mlp.w3.weight"),
        ("blocks.0.mlp.w12.weight", "blocks.0.mlp.w3.weight"),
    ),
    lambda shapes: _table(_eva02_names(shapes))(shapes),
)
BEIT_ORIGINAL = Family(
    "BEiT of its authors",
    (("blocks.0.attn.relative_position_index",),),
    _table({}),
    unlike=("layers.0.blocks.0.norm1.weight",),  # Swin, and FLatten Transformers
)
SWIN_ORIGINAL = Family(
    "Swin of its authors",
    (("layers.0.downsample.reduction.weight",), ("layers.0.blocks.0.attn.relative_position_index",)),
    lambda shapes: _table(_swin_names(shapes))(shapes),
    unlike=("layers.0.blocks.0.attn.dwc.weight",),  # FLatten Transformers keep these names
)
PVT_V2_ORIGINAL = Family(
    "PVTv2 of its authors",
    (("block1.0.attn.q.weight", "patch_embed1.proj.weight"),),
    _table(
        {
            **{f"block{n + 1}.*.mlp.dwconv.dwconv": f"stages.{n}.blocks.*.mlp.dwconv" for n in _STAGES},
            **{f"block{n + 1}.*": f"stages.{n}.blocks.*" for n in _STAGES},
            **{f"norm{n + 1}": f"stages.{n}.norm" for n in _STAGES},
            "patch_embed1": "patch_embed",
            **{f"patch_embed{n + 1}": f"stages.{n}.downsample" for n in _STAGES[1:]},
        }
    ),
    unlike=("block1.0.attn.dwc.weight",),
)
XCIT_ORIGINAL = Family(
    "XCiT of its authors",
    (("pos_embeder.token_projection.weight",),),
    _table({"pos_embeder": "pos_embed"}, finish=_finish_xcit),
)
LEVIT_BUFFERS = Family(
    "an older timm",
    (("attn.attention_bias_idxs",),),
    _table({}),
)
SAM_ORIGINAL = Family(
    "Segment Anything of its authors",
    (("image_encoder.blocks.0.mlp.lin1.weight",),),
    _table(
        {"blocks.*.mlp.lin1": "blocks.*.mlp.fc1", "blocks.*.mlp.lin2": "blocks.*.mlp.fc2"},
        prefix="image_encoder.",
        left_out={"prompt_encoder": "the encoder of prompts", "mask_decoder": "the decoder of masks"},
    ),
)


def _eva02_names(shapes: Shapes) -> dict[str, str]:
    """Biases of queries and values are those of their layers, where each has its own."""
    apart = "blocks.0.attn.q_proj.weight" in shapes
    biases = {f"blocks.*.attn.{part}_bias": f"blocks.*.attn.{part}_proj.bias" for part in "qv"}
    return {
        "blocks.*.mlp.w12": "blocks.*.mlp.fc1",
        "blocks.*.mlp.w1": "blocks.*.mlp.fc1_g",
        "blocks.*.mlp.w2": "blocks.*.mlp.fc1_x",
        "blocks.*.mlp.w3": "blocks.*.mlp.fc2",
        "blocks.*.mlp.ffn_ln": "blocks.*.mlp.norm",
        "blocks.*.attn.inner_attn_ln": "blocks.*.attn.norm",
        **(biases if apart else {}),
    }


def _swin_names(shapes: Shapes) -> dict[str, str]:
    """A stage ends with its downsampling there; in timm the next stage begins with it."""
    if "layers.0.downsample.reduction.weight" not in shapes:
        return {}
    moved = {f"layers.{n}.downsample": f"layers.{n + 1}.downsample" for n in _STAGES}
    return {**moved, "head.fc": "head.fc", "head": "head.fc"}


ORIGINAL = (
    DINOV3_ORIGINAL,
    DINOV2_ORIGINAL,
    PRETRAINED_VIT,
    DEIT3_ORIGINAL,
    EVA02_ORIGINAL,
    SWIN_ORIGINAL,
    BEIT_ORIGINAL,
    PVT_V2_ORIGINAL,
    XCIT_ORIGINAL,
    LEVIT_BUFFERS,
    SAM_ORIGINAL,
)
