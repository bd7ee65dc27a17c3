"""More images out of few, for a teacher that has an answer to any: flips, blends and patches. Ours.

The mixing is that of mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899), without their mixed labels: the
teacher is asked for its answer to the mixed image, as in "Knowledge distillation: A good teacher is patient
and consistent" (arXiv 2106.05237).
"""

from __future__ import annotations

import torch
from torch import Tensor


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images as they could have been: some mirrored, all of them blended with, or patched from, another one.

    Each image is mirrored left to right with probability 1/2. Then the batch is either blended with itself in
    another order, every image with a share of its own, or patched with a rectangle from there.

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
