"""Find the architecture that has a file's tensors: by fingerprints, then by building the candidates."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

from torch import nn

from mhacut.checkpoint.build import known_model, shapes_of
from mhacut.checkpoint.fingerprints import exact_matches, matches_of_any_size
from mhacut.checkpoint.header import FileHeader
from mhacut.checkpoint.infer import ResolvedModel, infer_from_shapes, position_shapes
from mhacut.checkpoint.record import SAVE_SLIM_ADVICE
from mhacut.checkpoint.visible_args import PIXELS, SIZES, is_cut
from mhacut.errors import CheckpointError, MhacutError, option_name
from mhacut.runtime.files import show
from mhacut.text import listed

_MAX_NAMES = 4
_NOT_COMPUTED = frozenset(
    (
        *("training", "pretrained_cfg", "default_cfg", "grad_checkpointing", "drop_prob", "p", "init_values"),
        *("img_size", "num_patches", "grid_size", "feature_size"),
    )
)
"""Module attributes that do not change outputs in eval mode once the weights are loaded."""
_ONLY_TRAINED = ("Identity", "Dropout", "DropPath", "PatchDropout", "DropBlock2d")

_FLATTEN: dict[str, tuple[str, ...]] = {
    "flatten_cswin": ("stage1.0.attns.0.positional_encoding", "stage1.0.attn.attns.0.positional_encoding"),
    "flatten_deit": ("blocks.0.attn.positional_encoding",),
    "flatten_pvt": ("block1.0.attn.positional_encoding",),
    "flatten_pvt_v2": ("block1.0.attn.positional_encoding", "stages.0.blocks.0.attn.positional_encoding"),
    "flatten_swin": ("layers.0.blocks.0.attn.positional_encoding",),
}
"""Modules that define FLatten models, mapped to tensor names that identify a file of these models."""


def search(header: FileHeader, args: Mapping[str, Any], *, normalised: bool = False) -> ResolvedModel:
    similar = matches_of_any_size(header.shapes)
    for names in (exact_matches(header.shapes), similar, _of_flatten(header.shapes)):
        fits = _nearest(_build(header, args, names), header)
        if fits:
            break
    else:
        raise CheckpointError(_nothing_fits(header, similar))
    # If the models differ in heads or activations, a wrong guess would change the logits: ask the user.
    named = {fit.identity.architecture: fit for fit in fits}
    order = sorted(named, key=lambda name: (not name.startswith("vit_"), len(name), name))
    chosen, *others = (named[name] for name in order)
    if not all(computes_the_same(chosen.skeleton, fit.skeleton) for fit in others):
        raise CheckpointError(
            f"{show(header.path)}: {len(order)} models with different outputs fit the names and shapes: "
            f"{listed(order, _MAX_NAMES)}. Choose one with {option_name('model', 'NAME')}"
        )
    same = [fit.identity.architecture for fit in others]
    if not same or normalised:
        return chosen
    choice = option_name("model", same[0])
    note = f"tensors also fit {listed(same, _MAX_NAMES)}, trained on other images. To choose, give {choice}"
    return dataclasses.replace(chosen, notes=(*chosen.notes, note))


def _of_flatten(names: Collection[str]) -> Iterator[str]:
    import timm

    for module, signs in _FLATTEN.items():
        if any(sign in names for sign in signs):
            yield from timm.list_models(module=module)


def _build(header: FileHeader, args: Mapping[str, Any], names: Iterable[str]) -> list[ResolvedModel]:
    built = []
    # The table may list models that the installed timm lacks.
    for name in filter(known_model, names):
        try:
            built.append(infer_from_shapes(name, args, {}, header.tensors))
        except MhacutError:
            continue  # does not take these arguments, or not at this image size
    return built


def _nearest(built: Iterable[ResolvedModel], header: FileHeader) -> list[ResolvedModel]:
    positions = position_shapes(header.tensors)
    fits = [
        model
        for model in built
        if position_shapes(model.tensors) == positions
        and shapes_of(model.skeleton) == {name: info.shape for name, info in model.tensors.items()}
    ]
    # The fewer arguments differ from timm's own, the likelier is the model.
    least = min(map(_distance, fits), default=0)
    return [fit for fit in fits if _distance(fit) == least]


def _distance(fit: ResolvedModel) -> tuple[int, int, int]:
    sizes, images = fit.inferred & SIZES, fit.inferred & PIXELS - {"num_classes"}
    return len(fit.inferred - SIZES - PIXELS), len(sizes), len(images)


def computes_the_same(model: nn.Module, other: nn.Module) -> bool:
    return _settings(model) == _settings(other)


def _settings(model: nn.Module) -> dict[str, str]:
    # Models with equal names and shapes have equal module trees, so settings can be compared by name.
    settings = {}
    for name, module in model.named_modules():
        if type(module).__name__ in _ONLY_TRAINED:
            continue
        settings[name] = type(module).__name__
        for key, value in vars(module).items():
            if not key.startswith("_") and key not in _NOT_COMPUTED:
                settings[f"{name}.{key}"] = _text(value)
        for key, buffer in module.named_buffers(recurse=False):  # tables of windows and positions
            if key in module._non_persistent_buffers_set:
                settings[f"{name}.{key}"] = str(tuple(buffer.shape))
    return settings


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float | str):
        return str(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, functools.partial):
        return f"{_text(value.func)}({_text(value.args)}, {_text(value.keywords)})"
    return value.__qualname__ if isinstance(value, type | FunctionType) else type(value).__qualname__


def _nothing_fits(header: FileHeader, similar: Sequence[str]) -> str:
    where = show(header.path)
    if is_cut(header.shapes):
        return f"{where}: seems to be the state dict of a slim model. {SAVE_SLIM_ADVICE}"
    found = f"{where}: no prunable timm model has exactly these {len(header.tensors)} tensors"
    if not any(word in name for name in header.tensors for word in ("attn", "attention", "qkv")):
        return f"{found}, and no tensor belongs to attention. mhacut prunes vision transformers"
    if "blocks.0.attn.qkv.weight" in header.tensors:
        options = option_name("model", "vit_tiny_patch16_224"), option_name("model_args", {"num_heads": "N"})
        return f"{found}. For timm's plain ViT of another width, give {' '.join(options)}"
    nearest = f". The nearest are {listed(similar, _MAX_NAMES)}" if similar else ""
    return (
        f"{found}. Give {option_name('model', 'NAME')}, and "
        f"{option_name('model_args', {'KEY': 'VALUE'})} for arguments that differ from its defaults{nearest}"
    )
