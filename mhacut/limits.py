"""Validation of untrusted values in files: kinds of numbers and image sizes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeGuard

MAX_PIXELS = 2048 * 2048
"""Largest number of pixels of an input image. Attention on larger images would need more than about 1 GB per
head."""

MIN_CROP_PCT = 0.1
"""Smallest ``crop_pct``. Images are resized to the input size divided by ``crop_pct``, then cropped."""
MAX_CROP_PCT = 1.25
"""Largest ``crop_pct``. Above 1, images are smaller than the input and get a border, as in timm's VOLO."""

MAX_PARALLEL = 1024
"""Largest number of threads or processes. OpenMP aborts without a message at much higher numbers."""

LICENSE = re.compile(r"[a-z0-9][a-z0-9.\-]{0,40}")
"""Pattern of license names on the Hugging Face Hub."""

REPOSITORY = re.compile(r"[\w\-]([\w.\-]{0,94}[\w\-])?/[\w\-]([\w.\-]{0,94}[\w\-])?", re.ASCII)
"""Pattern of repository names on the Hugging Face Hub: owner and name."""


def too_large(size: Sequence[int]) -> str:
    """Return why an image of ``size`` [C, H, W] or [H, W] is too large; empty if it is small enough.

    >>> too_large((3, 224, 224))
    ''
    >>> too_large((3, 30000, 30000))
    'at most 4194304 pixels (2048x2048) are allowed, found 30000x30000'
    """
    *_, height, width = size
    if height * width <= MAX_PIXELS:
        return ""
    return f"at most {MAX_PIXELS} pixels (2048x2048) are allowed, found {height}x{width}"


def is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
