"""Attention among the channels of a head instead of among tokens: XCiT's, EdgeNeXt's and DaViT's.

softmax over channels (x y^T) z, with x, y and z of [channels, tokens]. A channel of x is a row of the result:
it is cut exactly, with its column of the projection. Channels of y and z share the softmax: without one of
them the others would weigh more, so that they are not cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from timm.models import davit, edgenext, xcit
from torch import Tensor, nn

from mhacut.adapters.base import Adapter, Layer
from mhacut.adapters.projection import Projection
from mhacut.adapters.shapes import by_head
from mhacut.adapters.softmax import make_twin, read
from mhacut.plan import UnitKind

_SHARED_SOFTMAX = "a softmax runs over these channels: without one of them the others would weigh more"


class ChannelTwin(nn.Module):
    """The forward pass of a cut layer, for any widths."""

    spec: ChannelAttention

    def forward(self: Any, x: Tensor) -> Tensor:
        """[B, N, C] to [B, N, C_out]."""
        spec: ChannelAttention = self.spec
        heads, kept, whole = spec.sizes(self)
        sizes = [heads * (kept if part == "x" else whole) for part in spec.order]
        rows = dict(zip(spec.order, self.qkv(x).split(sizes, dim=-1), strict=True))
        x, y, z = (by_head(rows[part], heads).mT for part in "xyz")  # (B, H, d, N)
        weights = spec.similarity(self, x, y).softmax(dim=-1)  # (B, H, kept, whole)
        if hasattr(self, "attn_drop"):
            weights = self.attn_drop(weights)
        return read(self, (weights @ z).flatten(1, 2).mT)


@dataclass(eq=False)
class ChannelAttention(Adapter):
    """One ``qkv``, each third head-major. Channels of the result are called v: the projection reads them."""

    family = "attention"
    read_by = "proj"

    cls: type[nn.Module]
    similarity: Callable[[Any, Tensor, Tensor], Tensor]
    """(module, x [B, H, kept, N], y [B, H, d, N]) -> logits of the softmax, [B, H, kept, d]."""
    order: str = "xyz"
    """Order of the rows of ``qkv``."""
    heads_in: str = "num_heads"
    """Attribute with the number of heads."""

    def __post_init__(self) -> None:
        self.twin = make_twin(self, (ChannelTwin,))
        self.module_classes = (self.cls, self.twin)

    def sizes(self, module: Any) -> tuple[int, int, int]:
        """Heads, channels of each that make the result, and those that share the softmax."""
        heads, kept = getattr(module, self.heads_in), module.proj.in_features
        return heads, kept // heads, (module.qkv.out_features - kept) // (2 * heads)

    def describe(self, name: str, module: Any) -> Layer:
        heads, kept, whole = self.sizes(module)
        qkv, offset = Projection.of(module, "qkv"), heads * whole * self.order.index("x")
        value = {"value": qkv.hook("output", offset)}
        v = Projection.of(module, "proj").unit(name, "v", (heads, kept), qkv.rows(offset), value)
        return Layer(name, self, (v,), {"qk": _SHARED_SOFTMAX})

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        module.__class__ = self.twin


def cross_covariance(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT * m.temperature


def scaled_by_width(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Florence-2: logits over the root of the number of tokens, or of the width before the cut."""
    return (x * (x.shape[-1] if m.dynamic_scale else m.head_dim) ** -0.5) @ y.mT


CHANNEL_ATTENTION = (
    ChannelAttention(xcit.XCA, cross_covariance),
    ChannelAttention(edgenext.CrossCovarianceAttn, cross_covariance),
    # Its k is x, its v is y and its q is z.
    ChannelAttention(davit.ChannelAttention, lambda m, x, y: (x * m.scale) @ y.mT, order="zxy"),
    ChannelAttention(davit.ChannelAttentionV2, scaled_by_width, heads_in="groups"),
)
