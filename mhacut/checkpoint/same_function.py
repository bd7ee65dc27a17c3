"""Compare what models compute, apart from their weights: classes of modules, and their settings."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import nn

_NOT_COMPUTED = frozenset(
    ("training", "pretrained_cfg", "default_cfg", "grad_checkpointing", "drop_prob", "p", "init_values")
)
"""Attributes that change nothing about the outputs of a model in eval mode, once its weights are read."""
_OF_IMAGES = frozenset({"img_size", "num_patches", "grid_size", "feature_size"})
"""Attributes that state which images a model is built for. Its function depends on them only where shapes
of its tensors and windows do."""
_ONLY_TRAINED = ("Dropout", "DropPath", "PatchDropout", "DropBlock2d")


def differences(one: nn.Module, other: nn.Module) -> tuple[str, ...]:
    """Return what ``other`` computes differently, as ``num_heads 6, not 3``; empty if both compute the same.

    Modules of the same name are compared, which both models have if their tensors have the same names. Models
    that are built for images of another size compute the same if nothing but that size differs.
    """
    ours, theirs = dict(one.named_modules()), dict(other.named_modules())
    found: dict[str, None] = {}
    for name in ours.keys() | theirs.keys():
        for text in _differences(name, ours.get(name), theirs.get(name)):
            found[text] = None
    return tuple(sorted(found, key=lambda text: (text.count("."), len(text), text)))


def _differences(name: str, one: nn.Module | None, other: nn.Module | None) -> Iterator[str]:
    kinds = _kind(one), _kind(other)
    if kinds[0] is not kinds[1]:
        where = ".".join(part for part in name.split(".") if not part.isdigit()) or "model"
        yield f"{where} {kinds[1].__name__}, not {kinds[0].__name__}"
    elif one is not None and other is not None:
        ours, theirs = ({**_settings(module), **_buffer_shapes(module)} for module in (one, other))
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                yield f"{key} {theirs.get(key)!s:.40}, not {ours.get(key)!s:.40}"


def _kind(module: nn.Module | None) -> type[nn.Module]:
    """Class of a module; of one that does nothing in eval mode, an identity."""
    if module is None or type(module).__name__ in _ONLY_TRAINED:
        return nn.Identity
    return type(module)


def _settings(module: nn.Module) -> dict[str, str]:
    return {
        name: _text(value)
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in _NOT_COMPUTED | _OF_IMAGES
    }


def _buffer_shapes(module: nn.Module) -> dict[str, str]:
    """Shapes of tables that a module computes itself, of windows and positions for one."""
    return {
        name: "x".join(map(str, buffer.shape))
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    }


def _text(value: Any) -> str:
    """Text of a setting that is equal for equal settings; of other objects, their class."""
    if value is None or isinstance(value, bool | int | float | str):
        return str(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(one)}" for key, one in value.items()) + "}"
    if isinstance(value, functools.partial):
        return f"{_text(value.func)}({_text(value.args)}, {_text(value.keywords)})"
    if isinstance(value, type | FunctionType):
        return value.__qualname__
    return type(value).__qualname__
