"""Small FLatten Transformers."""

from __future__ import annotations

from helpers.models import ModelCase

# One of each family, at a size that takes no time: 64 pixels, 16 x 16 tokens in stage 1.
SMALL = {
    "flatten_pvt_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 40, 64)},
    "flatten_pvt_v2_b0": {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 40, 64)},
    "flatten_swin_tiny_224": {"depths": (1, 2, 1, 1), "embed_dim": 24, "window_size": 2},
    "flatten_cswin_tiny_224": {"depths": (1, 1, 1, 1), "embed_dim": 16, "split_size": 2},
    "flatten_deit_tiny": {"depth": 2, "embed_dim": 48},
}
FLATTEN = {
    name: ModelCase(name, {"img_size": 64, **args}, flops="60%", fast=name != "flatten_pvt_tiny")
    for name, args in SMALL.items()
}
