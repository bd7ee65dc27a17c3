"""Rows of channels that are unlike, and their moments."""

from __future__ import annotations

import torch

from mhacut.linalg.moments import Moments


def exact(x):
    """Moments with products in float64, unlike those taken of a model."""
    x = x.double()
    return Moments(x.shape[-2], x.sum(-2), x.transpose(-2, -1) @ x)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(count, width, seed):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mix + torch.arange(width)
