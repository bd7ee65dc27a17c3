"""Every family of other libraries' models that is recognised."""

from __future__ import annotations

from mhacut.checkpoint.foreign.clip import CLIP, SIGLIP
from mhacut.checkpoint.foreign.convolutional import LEVIT, MOBILEVIT, PVT_V2
from mhacut.checkpoint.foreign.dino import DINOV2, DINOV3
from mhacut.checkpoint.foreign.family import Family
from mhacut.checkpoint.foreign.open_clip import OPEN_CLIP
from mhacut.checkpoint.foreign.original import ORIGINAL
from mhacut.checkpoint.foreign.swin import SWIN, SWINV2
from mhacut.checkpoint.foreign.torchvision import (
    TORCHVISION_MAXVIT,
    TORCHVISION_SWIN,
    TORCHVISION_SWINV2,
    TORCHVISION_VIT,
)
from mhacut.checkpoint.foreign.vit import BEIT, VIT
from mhacut.checkpoint.foreign.wrapped import OPEN_CLIP_TRUNK, TIMM_WRAPPER

TRANSFORMERS = (VIT, BEIT, DINOV2, DINOV3, CLIP, SIGLIP, SWIN, SWINV2, PVT_V2, LEVIT, MOBILEVIT)
TORCHVISION = (TORCHVISION_VIT, TORCHVISION_SWIN, TORCHVISION_SWINV2, TORCHVISION_MAXVIT)
FAMILIES: tuple[Family, ...] = (
    *TRANSFORMERS,
    *TORCHVISION,
    OPEN_CLIP,
    OPEN_CLIP_TRUNK,
    TIMM_WRAPPER,
    *ORIGINAL,
)
"""Families in the order in which a file without a configuration is compared with their signs."""
