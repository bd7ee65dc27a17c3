"""``mhacut models`` as a function: prunable parts of timm's architectures, found without weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import timm
from torch import nn

from mhacut.adapters.registry import is_attention, is_pooling_head, looks_like_attention
from mhacut.checkpoint.build import without_values
from mhacut.errors import UnsupportedModelError
from mhacut.exporting.timm_model import NAME
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.tokens import why_not_merged


@dataclass(frozen=True)
class CatalogueEntry:
    architecture: str
    attention: tuple[str, ...]
    """Names of the prunable attention classes in the architecture."""
    kinds: tuple[str, ...]
    """Prunable kinds of channels: ``qk``, ``v``, ``hidden`` (of MLPs)."""
    not_prunable: tuple[str, ...]
    """Layers or parts of layers that cannot be pruned, each with the reason."""
    refusal: str | None
    """Reason why no part of the architecture can be pruned. None if a part can be pruned."""
    tags: tuple[str, ...]
    """Tags of timm's pretrained weights for the architecture."""
    transformer: bool
    """Whether the architecture has attention outside of pooling heads."""
    tokens_stay: str
    """Reason why tokens of the architecture cannot be merged. Empty if they can."""


def catalogue(
    pattern: str = "*", progress: Callable[[int, int, str], None] | None = None
) -> tuple[CatalogueEntry, ...]:
    """List the prunable parts of each timm architecture whose name matches ``pattern``."""
    names = architectures(pattern)
    entries = []
    for done, (name, tags) in enumerate(names.items()):
        entries.append(entry_of(name, build_weightless(name), tags))
        if progress is not None:
            progress(done + 1, len(names), name)
    return tuple(entries)


def architectures(pattern: str = "*") -> dict[str, tuple[str, ...]]:
    """Return the names of timm's dense architectures that match ``pattern``, with their pretrained tags."""
    tags: dict[str, list[str]] = {name: [] for name in timm.list_models(pattern) if name != NAME}
    for tagged in timm.list_pretrained():
        name, _, tag = tagged.partition(".")
        if name in tags:
            tags[name].append(tag)
    return {name: tuple(names) for name, names in tags.items()}


def build_weightless(name: str) -> nn.Module:
    with warnings.catch_warnings(), without_values():
        warnings.simplefilter("ignore")
        model: nn.Module = timm.create_model(name)
    return model


def entry_of(name: str, model: nn.Module, tags: Sequence[str]) -> CatalogueEntry:
    try:
        prunable = find_prunable_layers(model)
    except UnsupportedModelError as error:
        refusal = str(error)
        return CatalogueEntry(name, (), (), (), refusal, tuple(tags), _attends(model), tokens_stay=refusal)
    layers = [layer for layer in prunable.layers if layer.adapter.family == "attention" and layer.units]
    classes = {type(model.get_submodule(layer.name)).__name__ for layer in layers}
    kinds = {
        kind for layer in prunable.layers for kind in (*(u.kind for u in layer.units), *layer.coupled_with)
    }
    order = tuple(kind for kind in ("qk", "v", "hidden") if kind in kinds)
    # Without a classifier, merged tokens are copied back to their patches.
    reason = why_not_merged(model) and why_not_merged(model, unmerge=True)
    return CatalogueEntry(
        name,
        tuple(sorted(classes)),
        order,
        prunable.not_prunable,
        None,
        tuple(tags),
        transformer=True,
        tokens_stay=reason,
    )


def _attends(module: nn.Module) -> bool:
    if is_pooling_head(module):
        return False
    return is_attention(module) or looks_like_attention(module) or any(map(_attends, module.children()))
