"""Arguments of timm models inferred from the names and shapes in a file."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from mhacut.checkpoint.build import shapes_of
from mhacut.checkpoint.foreign.family import mlp_ratio

Shapes = Mapping[str, tuple[int, ...]]
InferredArg = tuple[str, Any, str]
"""Inferred argument of a timm model: (name, value, where in the file the value was found)."""

PIXELS = frozenset({"num_classes", "img_size", "in_chans"})
SIZES = frozenset({"depth", "patch_size"})
_SWITCHES: dict[str, tuple[str, Any, Any]] = {
    "blocks.0.attn.qkv.bias": ("qkv_bias", True, False),
    "blocks.0.ls1.gamma": ("init_values", 1e-5, None),  # it only initialises what the file overwrites
    "norm_pre.weight": ("pre_norm", True, False),
    "cls_token": ("class_token", True, False),
}
"""Tensor name, mapped to (timm argument, value if the file has the tensor, value otherwise)."""


def visible_args(model: nn.Module, shapes: Shapes, given: Mapping[str, Any]) -> tuple[InferredArg, ...]:
    """Return the arguments of ``model`` that differ in a file with these tensor shapes.

    The width is only inferred if ``num_heads`` is given. The number of classes and the image size are
    excluded.
    """
    expected = shapes_of(model)
    if is_foreign(expected, shapes):
        return ()
    rules = (
        _stem(model, expected, shapes),
        _depth(expected, shapes),
        _widths(model, expected, shapes, given),
        _switched(expected, shapes),
        _tokens(expected, shapes),
        _pooling(model, expected, shapes),
    )
    # timm swallows unknown arguments in some models and fails in others: only those that it names are used.
    accepted = _parameters(type(model)) - set(given)
    return tuple(arg for rule in rules for arg in rule if arg[0] in accepted)


def is_foreign(expected: Iterable[str], names: Iterable[str]) -> bool:
    ours, theirs = ({re.sub(r"\.\d+\.", ".", name) for name in side} for side in (expected, names))
    return len(ours & theirs) < len(theirs) / 2


def is_cut(shapes: Shapes) -> bool:
    """Whether ``shapes`` are of a slim model: blocks of equal width with different inner widths."""
    within: dict[tuple[str, str, int], set[int]] = {}
    for name, shape in shapes.items():
        stage, _, layer = f".{name}".rpartition(".blocks.")
        kind = layer.partition(".")[2]
        if kind in ("attn.proj.weight", "mlp.fc2.weight") and len(shape) == 2:
            within.setdefault((stage, kind, shape[0]), set()).add(shape[1])
    # Of a last block that computes few tokens, q is no part of qkv.
    attention = {name.rpartition(".attn.")[2] for name in shapes}
    return {"qkv.weight", "kv.weight"} <= attention or any(len(widths) > 1 for widths in within.values())


def _parameters(kind: type) -> set[str]:
    inits = [vars(base)["__init__"] for base in kind.__mro__[:-1] if "__init__" in vars(base)]
    return {name for init in inits for name in inspect.signature(init).parameters}


def _stem(model: Any, expected: Shapes, file: Shapes) -> Iterator[InferredArg]:
    first = model.pretrained_cfg.get("first_conv") or "patch_embed.proj"
    name = f"{first if isinstance(first, str) else first[0]}.weight"
    ours, theirs = expected.get(name, ()), file.get(name, ())
    if len(ours) != 4 or len(theirs) != 4:
        return
    # Behind another convolution, these are not the channels of images.
    if theirs[1] != ours[1] == getattr(model, "in_chans", 3):
        yield "in_chans", theirs[1], f"the shape of {name}"
    if name == "patch_embed.proj.weight" and theirs[2:] != ours[2:] and theirs[2] == theirs[3]:
        yield "patch_size", theirs[2], f"the shape of {name}"


def _depth(expected: Shapes, file: Shapes) -> Iterator[InferredArg]:
    ours, theirs = (_count(r"blocks\.(\d{1,4})\.", names) for names in (expected, file))
    if ours and theirs and ours != theirs:
        yield "depth", theirs, "the numbers of its blocks"


def _count(pattern: str, names: Iterable[str]) -> int:
    numbers = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    return len(numbers) if numbers == set(range(len(numbers))) else 0


def _widths(model: Any, expected: Shapes, file: Shapes, given: Mapping[str, Any]) -> Iterator[InferredArg]:
    width, ours = (_size(shapes, "patch_embed.proj.weight") for shapes in (file, expected))
    if width not in (0, ours) and "num_heads" in given:
        yield "embed_dim", width, "the shape of patch_embed.proj.weight"
    layer = "blocks.0.mlp.fc1.weight"
    (hidden, width), (our_hidden, ours) = (
        shapes[layer] if len(shapes.get(layer, ())) == 2 else (0, 0) for shapes in (file, expected)
    )
    plain = ours and type(model.blocks[0].mlp).__name__ == "Mlp"
    if plain and hidden and width and hidden * ours != our_hidden * width:
        yield "mlp_ratio", mlp_ratio(hidden, width), f"the shape of {layer}"


def _size(shapes: Shapes, name: str) -> int:
    return next(iter(shapes.get(name, ())), 0)


def _switched(expected: Shapes, file: Shapes) -> Iterator[InferredArg]:
    for tensor, (argument, with_it, without) in _SWITCHES.items():
        if (tensor in file) != (tensor in expected):
            is_there = tensor in file
            origin = tensor if is_there else f"the lack of {tensor}"
            yield argument, with_it if is_there else without, origin


def _tokens(expected: Shapes, file: Shapes) -> Iterator[InferredArg]:
    ours, theirs = ((*shapes.get("reg_token", (1, 0)), 0)[1] for shapes in (expected, file))
    if theirs != ours:
        for name in ("reg_tokens", "num_reg_tokens"):  # of ViT, and of EVA
            yield name, theirs, "the shape of reg_token"


def _pooling(model: Any, expected: Shapes, file: Shapes) -> Iterator[InferredArg]:
    def differs(name: str) -> bool:
        return (name in file) != (name in expected)

    pool = getattr(model, "global_pool", None)
    averaged, normed = "fc_norm.weight" in file, "norm.weight" in file
    if differs("attn_pool.latent") and "attn_pool.latent" in file:
        yield "global_pool", "map", "attn_pool"
    elif averaged and not normed and differs("norm.weight"):
        yield "global_pool", "avg", "fc_norm"
    elif normed and not averaged and differs("fc_norm.weight") and "cls_token" in file:
        yield "global_pool", "token", "norm, in place of fc_norm"
    elif pool == "token" and "cls_token" not in file and differs("cls_token"):
        yield "global_pool", "avg", "the lack of a cls_token"


def visible_classes(model: Any, shapes: Shapes) -> InferredArg:
    classifier = model.pretrained_cfg.get("classifier") or ()
    for name in (classifier,) if isinstance(classifier, str) else tuple(classifier):
        classes = _size(shapes, f"{name}.weight")
        if classes:
            return "num_classes", classes, f"the shape of {name}.weight"
    return "num_classes", 0, "the file, which has no classifier"


def visible_img_size(model: Any, shapes: Shapes) -> InferredArg | None:
    """Return the argument ``img_size`` that explains the length of ``pos_embed``; None if unknown."""
    file, expected = shapes.get("pos_embed"), getattr(model, "pos_embed", None)
    patch_embed = getattr(model, "patch_embed", None)
    patches, patch_size = getattr(patch_embed, "num_patches", None), getattr(patch_embed, "patch_size", None)
    if not isinstance(expected, Tensor) or file is None or len(file) != 3 or expected.dim() != 3:
        return None
    if file[1] == expected.shape[1] or file[::2] != (1, expected.shape[2]) or not isinstance(patches, int):
        return None
    stem = shapes.get("patch_embed.proj.weight", ())
    if not isinstance(patch_size, tuple) or patch_size[0] != patch_size[1]:
        return None
    if stem and stem[-1] != patch_size[1]:
        return None  # patches of another size: the grid would be misread
    # Class and register tokens may have a position of their own.
    side = _side(file[1] - (expected.shape[1] - patches))
    return None if side is None else ("img_size", side * int(patch_size[0]), "the shape of pos_embed")


def _side(patches: int) -> int | None:
    side = math.isqrt(max(patches, 0))
    return side if side and side * side == patches else None
