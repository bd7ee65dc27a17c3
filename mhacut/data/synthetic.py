"""Synthetic images, for pruning without data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LEAVES = 40
_SIZES = (0.05, 0.5)
"""Smallest and largest radius of a shape, divided by the longer image side. The radius has density r^-3."""
_STRETCH = 0.5
"""Largest logarithm of the factor by which a shape is stretched."""
_COLOURFULNESS = 0.3
"""Weight of a random colour when it is mixed with a random grey."""


def synthetic_images(
    count: int, input_size: tuple[int, int, int], mean: Sequence[float], std: Sequence[float], seed: int
) -> Tensor:
    """Return normalised dead-leaves images (overlapping random shapes), float32 [count, C, H, W].

    Their statistics resemble photographs (Lee, Mumford & Huang, IJCV 2001), and networks can be trained on
    them (Baradad et al., NeurIPS 2021). Image i depends only on ``seed`` and i.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.stack([_leaves(input_size, generator) for _ in range(count)])
    return images.sub(torch.tensor(tuple(mean)).view(-1, 1, 1)).div(torch.tensor(tuple(std)).view(-1, 1, 1))


def _leaves(input_size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    channels, height, width = input_size
    side = max(height, width)
    colours = torch.rand(LEAVES + 1, channels + 1, generator=generator)
    colours = torch.lerp(colours[:, :1], colours[:, 1:], _COLOURFULNESS)
    image = colours[-1].view(channels, 1, 1).repeat(1, height, width)
    most, least = (size**-2 for size in _SIZES)
    for draw, colour in zip(torch.rand(LEAVES, 6, generator=generator), colours[:-1], strict=True):
        size, stretch, direction, across, down, kind = draw.tolist()
        # Density r^-3 makes the image look the same at every scale, as photographs do.
        radius = side * (most + (least - most) * size) ** -0.5  # inverse of the cumulated r^-3
        stretch = math.exp(_STRETCH * (2 * stretch - 1))
        centre = (1.2 * down - 0.1) * height, (1.2 * across - 0.1) * width
        # A rectangle reaches sqrt(2) radii from its centre, a triangle 2, times the stretch.
        reach = 2 * radius * max(stretch, 1 / stretch) + 1
        (top, bottom), (left, right) = (
            (max(0, math.floor(middle - reach)), min(size, math.ceil(middle + reach)))
            for middle, size in zip(centre, (height, width), strict=True)
        )
        if top >= bottom or left >= right:
            continue
        y = torch.arange(top, bottom).add(0.5 - centre[0])[:, None]
        x = torch.arange(left, right).add(0.5 - centre[1])[None, :]
        angle = math.pi * direction
        along = (x * math.cos(angle) + y * math.sin(angle)) / stretch
        over = (y * math.cos(angle) - x * math.sin(angle)) * stretch
        cover = (radius - _DISTANCES[int(len(_DISTANCES) * kind)](along, over) + 0.5).clamp(0, 1)
        patch = image[:, top:bottom, left:right]
        patch.lerp_(colour.view(channels, 1, 1), cover)
    return image


def _disc(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y)


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs())


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    slope = math.sqrt(3) / 2
    return 1.3 * torch.maximum(y, torch.maximum(slope * x - 0.5 * y, -slope * x - 0.5 * y))


_DISTANCES = (_disc, _square, _triangle)
"""Functions of a point (x, y): the radius of the shape whose border passes through the point."""
