"""Preprocessing and class names that another library's files state, as timm's pretrained_cfg has them."""

from __future__ import annotations

from typing import Any

from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from mhacut.checkpoint.foreign.config import Config
from mhacut.limits import MAX_CROP_PCT

OF_IMAGENET: dict[str, Any] = {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)}
OF_INCEPTION: dict[str, Any] = {"mean": list(IMAGENET_INCEPTION_MEAN), "std": list(IMAGENET_INCEPTION_STD)}
OF_CLIP: dict[str, Any] = {"mean": list(OPENAI_CLIP_MEAN), "std": list(OPENAI_CLIP_STD)}
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Filters of Pillow by number."""
_MAX_LABEL = 200
"""Largest number of characters of a class name that is kept."""
_MOBILE = "MobileViT"
"""Beginning of the names of processors that, unless they state otherwise, flip channels, not normalise."""
_SHORTEST_EDGE = ("CLIP", "Levit", "MobileViT", "ConvNext", "Pvt", "EfficientFormer")
"""Beginnings of the names of processors to which a ``size`` of one number is the shortest edge, not both."""


def transformers_cfg(processor: Config, channels: int) -> dict[str, Any]:
    """Return the pretrained_cfg of a ``preprocessor_config.json``: mean, std, interpolation, crop.

    Args:
        processor: the file.
        channels: number of channels of the images.

    Raises:
        CheckpointError: a value is of another type or out of bounds.
    """
    scale = 255.0  # largest value of the pixels that mean and std are of; ours is 1
    rescales = processor.get("do_rescale", True)
    if rescales:
        scale *= processor.get("rescale_factor", 1 / 255) or 1 / 255
    mean, std = [0.0] * channels, [1.0] * channels
    normalises = "image_mean" in processor and not _kind(processor).startswith(_MOBILE)
    if processor.get("do_normalize", normalises):
        mean, std = processor.numbers("image_mean", channels), processor.numbers("image_std", channels)
        if not rescales and max(*mean, *std) <= 1 and (any(mean) or set(std) != {1.0}):
            scale = 1.0  # of pixels in 0..1, which transformers asks not to scale again
    cfg: dict[str, Any] = {
        "mean": [value / scale for value in mean],
        "std": [value / scale for value in std],
    }
    resample = processor.raw("resample")
    if isinstance(resample, int) and resample in _RESAMPLE:
        cfg["interpolation"] = _RESAMPLE[resample]
    return {**cfg, **_crop(processor)}


def image_side(processor: Config) -> int | None:
    """Return the side in pixels of the images that the processor makes; None if it states no square."""
    crops = processor.get("do_center_crop", "crop_size" in processor)
    return _side(processor, "crop_size") if crops else _side(processor, "size")


def flips_channels(processor: Config) -> bool:
    """Whether the channels of images are in the order blue, green, red."""
    return processor.get("do_flip_channel_order", _kind(processor).startswith(_MOBILE))


def _crop(processor: Config) -> dict[str, Any]:
    crop, resized = image_side(processor), _side(processor, "size")
    if crop is None or resized is None:
        return {}
    size = processor.raw("size")
    kind = _kind(processor)
    keeps_ratio = "shortest_edge" in size if isinstance(size, dict) else kind.startswith(_SHORTEST_EDGE)
    share = crop / resized
    if kind.startswith("Levit"):  # resizes to 256/224 of the size that it is given
        share *= 224 / 256
    elif keeps_ratio and crop == resized and "crop_pct" in processor and resized < 384:
        share = processor.get("crop_pct", 1.0)
    if not 0 < share <= MAX_CROP_PCT:
        return {}
    return {"crop_pct": share, "crop_mode": "center" if keeps_ratio else "squash"}


def _kind(processor: Config) -> str:
    return str(processor.raw("image_processor_type") or processor.raw("feature_extractor_type") or "")


def _side(processor: Config, name: str) -> int | None:
    value = processor.raw(name)
    if not isinstance(value, dict):
        return processor.get(name, 224) if value is not None else None
    inner = processor.part(name)
    if "shortest_edge" in inner:
        return inner.get("shortest_edge", 224)
    height = inner.get("height", 1)
    return height if "height" in inner and height == inner.get("width", 1) else None


def label_names(config: Config, classes: int) -> list[str] | None:
    """Return the class names of ``id2label`` in order; None if one is missing, or all are ``LABEL_0``, ..."""
    labels = config.raw("id2label")
    if not isinstance(labels, dict) or len(labels) != classes:
        return None
    names = [labels.get(str(index)) for index in range(classes)]
    if not all(isinstance(name, str) and len(name) <= _MAX_LABEL for name in names):
        return None
    if all(name == f"LABEL_{index}" for index, name in enumerate(names)):
        return None
    return [str(name) for name in names]
