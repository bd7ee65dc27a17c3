"""Attention that is not prunable: no channel can be cut by itself. The MLPs beside it are pruned.

MViT V2 normalises q, k and v over the channels of a head, behind convolutions that all heads share, and adds
q to the output; Gemma 4 normalises them too. CSATv2 weighs maps by the output of a block whose attention and
MLP have a single channel.
"""

from __future__ import annotations

from typing import Any

from timm.models.csatv2 import SpatialTransformerBlock
from timm.models.gemma4_vit import Gemma4Attention
from timm.models.mvitv2 import MultiScaleAttention, MultiScaleAttentionPoolFirst
from torch import nn

from mhacut.adapters.base import Adapter, Layer


class WholeAdapter(Adapter):
    """Attention classes of which nothing is prunable, for one reason."""

    family = "attention"

    def __init__(self, classes: tuple[type[nn.Module], ...], reason: str) -> None:
        """Refuse the units of ``classes`` for ``reason``, which the user reads."""
        self.module_classes = classes
        self.reason = reason

    def describe(self, name: str, module: Any) -> Layer:
        return Layer(name, self, (), {"qk": self.reason, "v": self.reason})


WHOLE_ATTENTION = (
    WholeAdapter(
        (MultiScaleAttention, MultiScaleAttentionPoolFirst, Gemma4Attention),
        "q, k and v are normalised over the channels of a head",
    ),
    WholeAdapter((SpatialTransformerBlock,), "q, k and v are a single channel"),
)
