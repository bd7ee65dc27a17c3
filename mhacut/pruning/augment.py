"""Image variations for distillation: flips, blends and patches. Ours.

The mixing is that of mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899), without their mixed labels: the
teacher runs on the mixed image itself, as in "Knowledge distillation: A good teacher is patient and
consistent" (arXiv 2106.05237).
"""

from __future__ import annotations

import torch
from torch import Tensor


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return variations of ``images``: some mirrored, all blended with or patched from another image.

    Each image is mirrored left to right with probability 1/2. Then the batch is either blended with itself in
    another order, in a random proportion for each image, or patched with one rectangle from there.

    Args:
        images: [B, C, H, W], on any device.
        generator: on the CPU.

    Returns:
        [B, C, H, W], new.
    """
    count, _, height, width = images.shape
    mirrored = (torch.rand(count, 1, 1, 1, generator=generator) < 0.5).to(images.device)
    images = torch.where(mirrored, images.flip(-1), images)
    others = images[torch.randperm(count, generator=generator).to(images.device)]
    if torch.rand((), generator=generator) < 0.5:
        share = torch.rand(count, 1, 1, 1, generator=generator).to(images)
        return share * images + (1 - share) * others
    side = float(torch.rand((), generator=generator).sqrt())  # the rectangle's area is uniform
    tall, wide = round(side * height), round(side * width)
    top = int(torch.randint(height - tall + 1, (), generator=generator))
    left = int(torch.randint(width - wide + 1, (), generator=generator))
    patched = images.clone()
    patched[..., top : top + tall, left : left + wide] = others[..., top : top + tall, left : left + wide]
    return patched
