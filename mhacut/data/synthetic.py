"""Images made of noise, for models without data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def synthetic_images(
    count: int, input_size: tuple[int, int, int], mean: Sequence[float], std: Sequence[float], seed: int
) -> Tensor:
    """Noise with the statistics of photographs, [count, C, H, W] float32, normalised.

    Amplitudes fall with spatial frequency as 1/f, the best known law of natural images (Field 1987), and the
    colour channels agree to nine tenths. Pixels have mean 0.5 and deviation 0.25 before they are clipped to
    0..1 and normalised. Image i depends on ``seed`` and i, not on ``count``.
    """
    channels, height, width = input_size
    rows, columns = torch.fft.fftfreq(height), torch.fft.rfftfreq(width)
    frequency = (rows[:, None] ** 2 + columns[None, :] ** 2).sqrt()
    # The mean of an image varies as its coarsest wave does: bright and dark pictures both exist.
    frequency[0, 0] = 1 / max(height, width)
    amplitude = 1 / frequency
    all_columns = torch.fft.fftfreq(width)
    power = 1 / (rows[:, None] ** 2 + all_columns[None, :] ** 2).clamp_min(1 / max(height, width) ** 2)
    amplitude = amplitude / power.mean().sqrt()  # white noise of deviation 1 keeps deviation 1
    generator = torch.Generator().manual_seed(seed)
    offset = torch.tensor(tuple(mean)).view(-1, 1, 1)
    scale = torch.tensor(tuple(std)).view(-1, 1, 1)
    images = torch.empty(count, channels, height, width)
    for image in images:
        white = torch.randn(channels + 1, height, width, generator=generator)
        pink = torch.fft.irfft2(torch.fft.rfft2(white) * amplitude, s=(height, width))
        mixed = math.sqrt(0.9) * pink[:1] + math.sqrt(0.1) * pink[1:]
        image.copy_((0.5 + 0.25 * mixed).clamp(0, 1).sub(offset).div(scale))
    return images
