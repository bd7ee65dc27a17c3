"""Attention among the channels of a head instead of among tokens: XCiT's, EdgeNeXt's and DaViT's.

softmax over channels (x y^T) z, with x, y and z of [channels, tokens]. A channel of x is a row of the result,
so that it goes with its column of the projection, exactly. Channels of y and z share the softmax: without one
of them the others would weigh more, so that they stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import davit, edgenext, xcit
from torch import Tensor, nn

from mhacut.adapters.base import Adapter, Layer, Unit
from mhacut.adapters.rows import Projection
from mhacut.plan import UnitKind

_SHARED_SOFTMAX = "a softmax runs over these channels: without one of them the others would weigh more"


class _AnyWidths:
    """A forward for any widths. Mixed into timm's classes by ``resize``, never constructed."""

    order = "xyz"
    """Of the rows of ``qkv``."""
    heads_name = "num_heads"

    def similarity(self, x: Tensor, y: Tensor) -> Tensor:
        """What the softmax is taken of, [B, H, w, d], for x [B, H, w, N] and y [B, H, d, N]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] to [B, N, C_out]."""
        module: Any = self
        heads = getattr(module, self.heads_name)
        kept = module.proj.in_features
        whole = (module.qkv.out_features - kept) // 2
        sizes = [kept if part == "x" else whole for part in self.order]
        parts = {
            part: rows.transpose(1, 2).reshape(rows.shape[0], heads, -1, rows.shape[1])
            for part, rows in zip(self.order, torch.split(module.qkv(x), sizes, dim=-1), strict=True)
        }
        weights = self.similarity(parts["x"], parts["y"]).softmax(dim=-1)
        if hasattr(module, "attn_drop"):
            weights = module.attn_drop(weights)
        projected: Tensor = module.proj((weights @ parts["z"]).flatten(1, 2).transpose(1, 2))
        return module.proj_drop(projected) if hasattr(module, "proj_drop") else projected


class _CrossCovariance(_AnyWidths):
    def similarity(self, x: Tensor, y: Tensor) -> Tensor:
        temperature: Tensor = self.temperature  # type: ignore[attr-defined]
        return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).transpose(-2, -1) * temperature


class SlimXca(_CrossCovariance, xcit.XCA):  # type: ignore[misc]
    """XCiT's, at any widths."""


class SlimCrossCovarianceAttn(_CrossCovariance, edgenext.CrossCovarianceAttn):  # type: ignore[misc]
    """EdgeNeXt's, at any widths."""


class SlimChannelAttention(_AnyWidths, davit.ChannelAttention):  # type: ignore[misc]
    """DaViT's, at any widths; its k makes the rows of the result, of q."""

    order = "zxy"

    def similarity(self, x: Tensor, y: Tensor) -> Tensor:
        scale: float = self.scale
        return (x * scale) @ y.transpose(-2, -1)


class SlimChannelAttentionV2(_AnyWidths, davit.ChannelAttentionV2):  # type: ignore[misc]
    """DaViT's of Florence-2, at any widths."""

    heads_name = "groups"

    def similarity(self, x: Tensor, y: Tensor) -> Tensor:
        # Of all channels that a head had: what was cut does not change the others.
        scale: float = x.shape[-1] ** -0.5 if self.dynamic_scale else self.head_dim**-0.5
        return (x * scale) @ y.transpose(-2, -1)


class ChannelAttentionAdapter(Adapter):
    """One ``qkv``, each third head-major. Channels of the result are called v: the projection reads them."""

    family = "attention"

    def __init__(self, dense: type[Any], slim: type[Any]) -> None:
        """Serve ``dense``, as ``slim`` once cut."""
        self.module_classes = (dense, slim)
        self.slim = slim

    def describe(self, name: str, module: Any) -> Layer:
        heads, kept, whole = self._widths(module)
        qkv, proj = Projection.of(module, "qkv"), Projection.of(module, "proj")
        offset = heads * whole * self.slim.order.index("x")
        v = Unit(
            name,
            "v",
            heads,
            kept,
            axes=(*qkv.rows(offset), proj.columns()),
            scale_axes=(proj.columns(),),
            hooks={"value": qkv.hook("output", offset), "output": proj.hook("input")},
            output_projection=proj.columns(),
            output_bias=proj.bias,
        )
        return Layer(name, self, (v,), {"qk": _SHARED_SOFTMAX})

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> nn.Module:
        module.__class__ = self.slim
        slim: nn.Module = module
        return slim

    def _widths(self, module: Any) -> tuple[int, int, int]:
        """Heads, channels of each that make the result, and those that share the softmax."""
        heads, kept = getattr(module, self.slim.heads_name), module.proj.in_features
        return heads, kept // heads, (module.qkv.out_features - kept) // (2 * heads)


CHANNEL_ATTENTION = (
    ChannelAttentionAdapter(xcit.XCA, SlimXca),
    ChannelAttentionAdapter(edgenext.CrossCovarianceAttn, SlimCrossCovarianceAttn),
    ChannelAttentionAdapter(davit.ChannelAttention, SlimChannelAttention),
    ChannelAttentionAdapter(davit.ChannelAttentionV2, SlimChannelAttentionV2),
)
