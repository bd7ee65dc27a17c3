"""Facts about a timm model that timm keeps in several places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def model_input_size(
    model: nn.Module, pretrained_cfg: Mapping[str, Any], model_args: Mapping[str, Any] | None = None
) -> tuple[int, int, int]:
    """Return [C, H, W] that ``model`` is built for, from the model, its arguments or timm's record.

    Args:
        model: a timm model.
        pretrained_cfg: timm's record of it.
        model_args: arguments it was made with. Some models, Twins and LeViT among them, take an ``img_size``
            that they do not keep.
    """
    channels, height, width = pretrained_cfg.get("input_size", (3, 224, 224))
    size = getattr(patch_embedding(model), "img_size", None)
    if size is None and model_args is not None:
        size = model_args.get("img_size")
    if isinstance(size, int):
        size = (size, size)
    if size is not None:
        height, width = size
    # Not from the patch embedding: behind a convolutional stem it sees that stem's channels.
    return int(getattr(model, "in_chans", channels)), int(height), int(width)


def patch_embedding(model: nn.Module) -> Any:
    """Return the module of ``model`` that embeds patches of the image and knows its size, or None."""
    # CoaT's is the first of several. Visformer's first embeds the output of a stem.
    first: Any = getattr(model, "patch_embed1", None)
    sees_it = getattr(getattr(first, "proj", None), "in_channels", None) == getattr(model, "in_chans", None)
    return getattr(model, "patch_embed", first if sees_it else None)


def classifier_size(model: Any) -> int:
    """Number of classes of the head; 0 for a model that outputs features."""
    return int(getattr(model, "num_classes", 0) or 0)


def gives_probabilities(model: Any) -> bool:
    """Whether the outputs are logits of several classes; the softmax over a single one is always 1."""
    return classifier_size(model) > 1
