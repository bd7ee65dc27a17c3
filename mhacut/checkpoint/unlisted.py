"""Architectures to try that the table of fingerprints cannot name, by their first block."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mhacut.checkpoint.build import build_skeleton, shapes_of
from mhacut.checkpoint.fingerprints import Shapes, read_table
from mhacut.checkpoint.identity import ModelIdentity
from mhacut.errors import MhacutError

_FLATTEN: dict[str, str | tuple[str, ...]] = {
    "flatten_cswin": ("stage1.0.attns.0.positional_encoding", "stage1.0.attn.attns.0.positional_encoding"),
    "flatten_deit": "blocks.0.attn.positional_encoding",
    "flatten_pvt": "block1.0.attn.positional_encoding",
    "flatten_pvt_v2": ("block1.0.attn.positional_encoding", "stages.0.blocks.0.attn.positional_encoding"),
    "flatten_swin": "layers.0.blocks.0.attn.positional_encoding",
}
"""Our own modules, whose authors' files have other names, and prefixes of a tensor name of each such file."""
_OF_TIMM: dict[str, str | tuple[str, ...]] = {
    "vision_transformer": "blocks.",
    "deit": "blocks.",
    "vision_transformer_hybrid": "patch_embed.backbone.",
    "pit": "transformers.",
    "naflexvit": "embeds.",
}
"""Modules of timm that are searched where its version is not that of the table."""


def unlisted_models(shapes: Shapes, args: Mapping[str, Any]) -> Iterator[str]:
    """Yield the models whose first block is in the file. That is much cheaper than building all of them.

    Args:
        shapes: shape of each tensor of the file.
        args: arguments of ``timm.create_model`` that the user gave.
    """
    import timm

    another_timm = timm.__version__ != read_table().timm
    patch = shapes.get("patch_embed.proj.weight", shapes.get("embeds.proj.weight", ()))[-1:]
    for family, telltale in {**_FLATTEN, **(_OF_TIMM if another_timm else {})}.items():
        if not any(name.startswith(telltale) for name in shapes):
            continue
        for name in timm.list_models(module=family):
            named_patch = re.search(r"patch(\d+)", name)
            if patch and "patch_size" not in args and named_patch and (int(named_patch[1]),) != patch:
                continue
            try:
                probe = build_skeleton(ModelIdentity(name, {"depth": 1, **args}))
            except MhacutError:
                yield name  # takes no depth
                continue
            if all(_agrees(key, shape, shapes) for key, shape in shapes_of(probe).items()):
                yield name


def _agrees(key: str, shape: tuple[int, ...], shapes: Shapes) -> bool:
    if key == "pos_embed" or key.startswith("head"):  # of the image size, of the classes
        return True
    return shapes.get(key) == shape
