"""Attention of which only the first tokens are read: q is computed for those, k and v for all.

timm has such a class for CaiT only. This one stands in for the last attention of a plain ViT; its forward
pass is that of its row in :mod:`mhacut.adapters.softmax_table`.
"""

from __future__ import annotations

from timm import layers
from torch import nn


class ReadAttention(layers.Attention):  # type: ignore[misc]
    """timm's attention with a projection ``q``, and ``kv`` for k and v, in place of ``qkv``.

    Made of timm's by :func:`mhacut.surgery.tokens.apply_tokens`; never constructed.
    """

    read: int
    """Number of first tokens that are read."""
    q: nn.Linear
    kv: nn.Linear
