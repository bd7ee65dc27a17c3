"""Search timm for the architecture whose tensors a file has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mhacut.checkpoint.build import build_skeleton, shapes_of
from mhacut.checkpoint.header import FileHeader
from mhacut.checkpoint.identity import ModelIdentity
from mhacut.checkpoint.infer import Identified, Shapes, infer_from_shapes, position_shapes
from mhacut.errors import CheckpointError, MhacutError, option_name
from mhacut.runtime.files import show

SEARCHED_FAMILIES: dict[str, str | tuple[str, ...]] = {
    "vision_transformer": "blocks.",
    "deit": "blocks.",
    "vision_transformer_hybrid": "patch_embed.backbone.",
    "pit": "transformers.",
    "naflexvit": "embeds.",
    "flatten_cswin": ("stage1.0.attns.0.positional_encoding", "stage1.0.attn.attns.0.positional_encoding"),
    "flatten_deit": "blocks.0.attn.positional_encoding",
    "flatten_pvt": "block1.0.attn.positional_encoding",
    "flatten_pvt_v2": ("block1.0.attn.positional_encoding", "stages.0.blocks.0.attn.positional_encoding"),
    "flatten_swin": "layers.0.blocks.0.attn.positional_encoding",
}
"""timm modules that are searched, and prefixes of a tensor name that each file of theirs has. Models of other
modules need the option ``model``."""


def search(header: FileHeader, args: Mapping[str, Any]) -> Identified:
    """Return the only model of :data:`SEARCHED_FAMILIES` that has exactly the file's names and shapes.

    Args:
        header: header of the file.
        args: arguments of ``timm.create_model`` that the user gave.

    Raises:
        CheckpointError: no model, or more than one, has them.
    """
    exact: list[Identified] = []
    resized: list[Identified] = []
    for name in _plausible(header.shapes, args):
        try:
            fit = infer_from_shapes(name, args, {}, header.tensors)
        except MhacutError:
            continue  # does not take these arguments, or not at this image size
        same_positions = position_shapes(fit.tensors) == position_shapes(header.tensors)
        if same_positions and shapes_of(fit.skeleton) == {n: info.shape for n, info in fit.tensors.items()}:
            inferred_size = "img_size" in fit.identity.model_args and "img_size" not in args
            (resized if inferred_size else exact).append(fit)
    fits = exact or resized
    where = show(header.path)
    if not fits:
        raise CheckpointError(
            f"{where}: the model cannot be identified: no timm model of "
            f"{', '.join(SEARCHED_FAMILIES)} has exactly its {len(header.tensors)} tensors; give "
            f"{option_name('model', 'NAME')} (and {option_name('model_args', {'KEY': 'VALUE'})} for "
            "what differs)"
        )
    if len(fits) > 1:
        names = ", ".join(fit.identity.architecture for fit in fits)
        raise CheckpointError(
            f"{where}: the model cannot be identified from names and shapes, {len(fits)} fit: {names}; "
            f"give {option_name('model', 'NAME')} (they may differ in heads, activation or preprocessing)"
        )
    return fits[0]


def _plausible(shapes: Shapes, args: Mapping[str, Any]) -> Iterator[str]:
    """Yield the models whose first block is in the file. That is much cheaper than building all of them."""
    import timm

    patch = shapes.get("patch_embed.proj.weight", shapes.get("embeds.proj.weight", (0,)))[-1]
    for family, telltale in SEARCHED_FAMILIES.items():
        if not any(name.startswith(telltale) for name in shapes):
            continue
        for name in timm.list_models(module=family):
            named_patch = re.search(r"patch(\d+)", name)
            if patch and "patch_size" not in args and named_patch and int(named_patch[1]) != patch:
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
