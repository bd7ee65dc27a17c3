"""VOLO's outlook attention: the weights of a point's neighbours are projected from it, without q and k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from timm.models.volo import OutlookAttention
from torch import Tensor

from mhacut.adapters.base import Adapter, Layer
from mhacut.adapters.projection import Projection
from mhacut.adapters.shapes import as_tokens
from mhacut.plan import UnitKind


class SlimOutlookAttention(OutlookAttention):  # type: ignore[misc]
    """VOLO's attention, at any width. Made by ``resize``, never constructed."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H, W, C_out]."""
        batch, height, width, _ = x.shape
        window, heads = self.kernel_size**2, self.num_heads
        logits = self.attn(as_tokens(self.pool(x.permute(0, 3, 1, 2))))  # (B, N, H * k^4)
        logits = logits.reshape(batch, -1, heads, window, window).transpose(1, 2) * self.scale
        weights = self.attn_drop(logits.softmax(dim=-1))  # (B, H, N, k^2, k^2)
        v = self.unfold(self.v(x).permute(0, 3, 1, 2)).reshape(batch, heads, -1, window, weights.shape[2])
        mixed = (weights @ v.permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2)  # (B, H, d, k^2, N)
        out = F.fold(
            mixed.reshape(batch, -1, weights.shape[2]),
            output_size=(height, width),
            kernel_size=self.kernel_size,
            padding=self.padding,
            stride=self.stride,
        )
        return self.proj_drop(self.proj(out.permute(0, 2, 3, 1)))


class OutlookAdapter(Adapter):
    """``v``, head-major; there is no q and no k."""

    family = "attention"
    module_classes = (OutlookAttention, SlimOutlookAttention)

    def describe(self, name: str, module: Any) -> Layer:
        value, proj = Projection.of(module, "v"), Projection.of(module, "proj")
        size, hooks = (module.num_heads, proj.reads // module.num_heads), {"value": value.hook("output")}
        return Layer(name, self, (proj.unit(name, "v", size, value.rows(), hooks, mixing="rotate"),))

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        module.__class__ = SlimOutlookAttention
