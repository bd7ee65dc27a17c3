"""How images may be sized, wherever that is said: no file may make a model eat the memory."""

from __future__ import annotations

from collections.abc import Sequence

MAX_PIXELS = 2048 * 2048
"""Of an image. Far above what any ViT of timm is made for (1024 x 1024); at patches of 16 pixels it is 16,384
tokens, whose attention logits take 1 GB per head where they are held in memory."""
MAX_VALUES = 16 * MAX_PIXELS
"""Of an image, all channels together; 256 MB in float32."""

MAX_CROP_PCT = 1.25
"""Above 1 an image is made smaller than the input and a border put around it: timm's VOLO at 448 and 512
pixels says 1.15."""


def too_large(size: Sequence[int]) -> str:
    """What is wrong with an image of ``size``, [C, H, W] or [H, W]; empty if nothing is.

    >>> too_large((3, 224, 224))
    ''
    >>> too_large((3, 30000, 30000))
    'at most 4194304 pixels (2048x2048) are allowed, found 30000x30000'
    """
    *channels, height, width = size
    if height * width > MAX_PIXELS:
        return f"at most {MAX_PIXELS} pixels (2048x2048) are allowed, found {height}x{width}"
    if channels and channels[0] * height * width > MAX_VALUES:
        return (
            f"at most {MAX_VALUES} values (16 channels of 2048x2048) are allowed, "
            f"found {channels[0]}x{height}x{width}"
        )
    return ""
