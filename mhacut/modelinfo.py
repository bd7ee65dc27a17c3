"""Small questions about a timm model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mhacut.surgery import Anatomy

SMALL_IMAGE = 64
"""Pixels. Images up to this size are taken whole: a crop recommended for larger ones does not apply."""


def model_input_size(model: nn.Module, pretrained_cfg: Mapping[str, Any]) -> tuple[int, int, int]:
    """[C, H, W] that ``model`` is built for: its patch embedding knows, else its pretrained_cfg."""
    channels, height, width = pretrained_cfg.get("input_size", (3, 224, 224))
    patch_embed: Any = getattr(model, "patch_embed", None)
    size = getattr(patch_embed, "img_size", None)
    if isinstance(size, int):
        size = (size, size)
    if size is not None:
        height, width = size
    convolution: Any = getattr(patch_embed, "proj", None)
    if isinstance(convolution, nn.Conv2d):
        channels = convolution.in_channels
    return int(channels), int(height), int(width)


def classifier_size(model: Any) -> int:
    """Classes of the head; 0 for a model that gives features."""
    return int(getattr(model, "num_classes", 0) or 0)


def left_whole(anatomy: Anatomy) -> tuple[str, ...]:
    """One line per reason for what is not cut: which units of how many layers, and pooling heads."""
    layers: dict[str, list[str]] = {}
    for layer in anatomy.layers:
        for kind, reason in layer.left_whole.items():
            layers.setdefault(f"{kind}: {reason}", []).append(layer.name)
    lines = [f"{what} ({len(names)} layers, first {names[0]})" for what, names in layers.items()]
    lines += [f"{name}: a pooling head is left alone" for name in anatomy.left_alone]
    return tuple(lines)
