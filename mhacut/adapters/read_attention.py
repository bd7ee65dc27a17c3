"""Attention of which only the first tokens are read: q is computed for those, k and v for all.

timm has such a class for CaiT only. These are made of timm's, never constructed, for the last block of a ViT
(:func:`mhacut.surgery.read.read_first`); their forward pass is that of their row in the softmax table.
"""

from __future__ import annotations

from timm import layers
from timm.models import beit, eva, vision_transformer_relpos


class Read:
    """Mixed into an attention class, in front of it; ``read`` is the number of first tokens that are read."""

    read: int


class ReadAttention(Read, layers.Attention):  # type: ignore[misc]
    """timm's attention with projections ``q`` and ``kv``."""


class ReadRelPosAttention(Read, vision_transformer_relpos.RelPosAttention):  # type: ignore[misc]
    """Attention of a relative-position ViT with projections ``q`` and ``kv``."""


class ReadBeitAttention(Read, beit.Attention):  # type: ignore[misc]
    """BEiT's attention with projections ``q``, ``k`` (which has no bias) and ``v``."""


class ReadRopeAttention(Read, layers.attention.AttentionRope):  # type: ignore[misc]
    """Rotary attention with separate projections, as timm has it with ``qkv_fused=False``."""


class ReadEvaAttention(Read, eva.EvaAttention):  # type: ignore[misc]
    """EVA's attention with separate projections, as timm has it with ``qkv_fused=False``."""
