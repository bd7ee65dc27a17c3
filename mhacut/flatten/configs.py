"""timm's ``pretrained_cfg`` of the FLatten Transformers; there are no weights to download."""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def config(**own: Any) -> dict[str, Any]:
    """Return a ``pretrained_cfg`` with the authors' preprocessing; ``own`` overrides its values.

    Images are resized to a square of 256/224 of the image size, then cropped. There is no ``license``: the
    official repository states none for its weights.
    """
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "pool_size": (7, 7),
        "crop_pct": 224 / 256,
        "crop_mode": "squash",
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head",
        "origin_url": "https://github.com/LeapLabTHU/FLatten-Transformer",
        "paper_name": "FLatten Transformer: Vision Transformer using Focused Linear Attention",
        "paper_ids": "arXiv:2308.00442",
        **own,
    }
