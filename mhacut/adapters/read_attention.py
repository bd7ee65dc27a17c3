"""Attention of which only the first tokens are read: q is computed for those, k and v for all.

timm has such a class for CaiT only. These stand in for the last attention of a ViT; their forward pass is
that of their row in :mod:`mhacut.adapters.softmax_table`. They are made of timm's, with a projection of its
own for q, by :func:`mhacut.surgery.tokens.apply_tokens`; never constructed.
"""

from __future__ import annotations

from timm import layers
from timm.models import beit, eva, vision_transformer_relpos


class ReadAttention(layers.Attention):  # type: ignore[misc]
    """timm's attention with projections ``q`` and ``kv``."""

    read: int
    """Number of first tokens that are read."""


class ReadRelPosAttention(vision_transformer_relpos.RelPosAttention):  # type: ignore[misc]
    """Attention of a relative-position ViT with projections ``q`` and ``kv``."""

    read: int


class ReadBeitAttention(beit.Attention):  # type: ignore[misc]
    """BEiT's attention with projections ``q``, ``k`` (which has no bias) and ``v``."""

    read: int


class ReadRopeAttention(layers.attention.AttentionRope):  # type: ignore[misc]
    """Rotary attention with separate projections, as timm has it with ``qkv_fused=False``."""

    read: int


class ReadEvaAttention(eva.EvaAttention):  # type: ignore[misc]
    """EVA's attention with separate projections, as timm has it with ``qkv_fused=False``."""

    read: int
