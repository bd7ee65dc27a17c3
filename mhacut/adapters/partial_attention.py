"""Attention of which only what leaves it can be cut: MobileViT V2, VOLO's Outlook, DaViT's over channels.

In all of them the weights are not a product of q and k over tokens, and a channel of the weights cannot go
without changing the others; what those weights are applied to has channels that each go their own way to the
projection. Their q/k are left whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from timm.models.davit import ChannelAttention, ChannelAttentionV2
from timm.models.mobilevit import LinearSelfAttention
from timm.models.volo import OutlookAttention
from torch import Tensor, nn

from mhacut.adapters.base import Adapter, ChannelAxis, Layer, Tap, Unit
from mhacut.adapters.fused import by_head
from mhacut.adapters.rows import rows
from mhacut.plan import UnitKind

NO_PRODUCT = "the attention is not a product of q and k"
OVER_CHANNELS = "the softmax runs over the channels"


class _PartialAdapter(Adapter):
    """Only a v unit."""

    family = "attention"
    projection = "proj"
    reason = NO_PRODUCT
    channel_dim = -1
    rotatable = False

    def made(self, module: Any) -> tuple[tuple[str, int], ...]:
        """(linear layer, first row) for each block of rows that makes the channels, values first."""
        raise NotImplementedError

    def describe(self, name: str, module: Any) -> Layer:
        columns, heads = ChannelAxis(f"{self.projection}.weight", 1), self.heads(module)
        made = self.made(module)
        v = Unit(
            name,
            "v",
            heads,
            _width(module, self.projection, heads),
            axes=(*(axis for layer, first in made for axis in rows(module, layer, first)), columns),
            gain_axes=(columns,),
            taps={
                "value": Tap(made[0][0], "output", made[0][1], self.channel_dim),
                "output": Tap(self.projection, "input", channel_dim=self.channel_dim),
            },
            readout=columns,
            readout_bias=f"{self.projection}.bias"
            if module.get_submodule(self.projection).bias is not None
            else None,
            rotatable=self.rotatable,
        )
        return Layer(name, self, (v,), {"qk": self.reason}, self.channel_dim)


class LinearSelfAdapter(_PartialAdapter):
    """MobileViT V2's: out_i = relu(v_i) * sum(softmax(q) k_i), q a number per token; k and v go together."""

    module_classes = (LinearSelfAttention,)
    projection = "out_proj"
    channel_dim = 1

    def heads(self, module: Any) -> int:
        """There are none."""
        return 1

    def made(self, module: Any) -> tuple[tuple[str, int], ...]:
        """Rows are q, of which there is one, k, v."""
        return ("qkv_proj", 1 + module.embed_dim), ("qkv_proj", 1)

    def flops(self, module: Any, input_shape: tuple[int, ...], widths: Mapping[UnitKind, Any]) -> Any:
        batch, dim, *patches = input_shape
        return batch * math.prod(patches) * widths["v"] * (2 * dim + module.out_proj.out_channels)

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> nn.Module:
        module.embed_dim = widths["v"]  # by which timm splits k from v
        slim: nn.Module = module
        return slim


class SlimOutlookAttention(OutlookAttention):  # type: ignore[misc]
    """VOLO's ``OutlookAttention`` at any width. Made by ``resize``, never constructed."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps, [B, H, W, C] to [B, H, W, C]."""
        batch, height, width, _ = x.shape
        area, heads = self.kernel_size**2, self.num_heads
        values = self.unfold(self.v(x).movedim(-1, 1))  # (B, heads * d * area, N)
        values = values.view(batch, heads, -1, area, values.shape[-1]).permute(0, 1, 4, 3, 2)
        centres = self.pool(x.movedim(-1, 1)).movedim(1, -1).flatten(1, 2)  # (B, N, C)
        logits = self.attn(centres).view(batch, -1, heads, area, area).transpose(1, 2)
        weights = self.attn_drop((logits * self.scale).softmax(dim=-1))
        out = (weights @ values).permute(0, 1, 4, 3, 2)  # (B, heads, d, area, N)
        folded = F.fold(
            out.reshape(batch, -1, out.shape[-1]),
            (height, width),
            kernel_size=self.kernel_size,
            padding=self.padding,
            stride=self.stride,
        )
        projected: Tensor = self.proj_drop(self.proj(folded.movedim(1, -1)))
        return projected


class OutlookAdapter(_PartialAdapter):
    """VOLO's: a linear layer makes weights for the neighbours of a token, ``v`` the values."""

    module_classes = (OutlookAttention, SlimOutlookAttention)
    rotatable = True

    def made(self, module: Any) -> tuple[tuple[str, int], ...]:
        return (("v", 0),)

    def flops(self, module: Any, input_shape: tuple[int, ...], widths: Mapping[UnitKind, Any]) -> Any:
        batch, height, width, dim = input_shape
        centres = math.ceil(height / module.stride) * math.ceil(width / module.stride)
        each = height * width * (dim + module.proj.out_features) + centres * module.kernel_size**4
        return batch * module.num_heads * widths["v"] * each

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> nn.Module:
        # Its scale belongs to the weights and stays.
        module.__class__ = SlimOutlookAttention
        slim: nn.Module = module
        return slim


class SlimChannelAttention(ChannelAttention):  # type: ignore[misc]
    """DaViT's ``ChannelAttention`` at any width. Made by ``resize``, never constructed."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] to [B, N, C]: every k channel is answered by a mean of q channels."""
        whole = (self.qkv.out_features - self.proj.in_features) // 2
        parts = self.qkv(x).split((whole, self.proj.in_features, whole), dim=-1)
        q, k, v = (by_head(part, self.num_heads) for part in parts)
        weights = ((k * self.scale).mT @ v).softmax(dim=-1)  # (B, H, d_k, d_v)
        out: Tensor = self.proj((weights @ q.mT).mT.transpose(1, 2).flatten(-2))
        return out


class SlimChannelAttentionV2(ChannelAttentionV2):  # type: ignore[misc]
    """DaViT's ``ChannelAttentionV2`` at any width. Made by ``resize``, never constructed."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] to [B, N, C]: every q channel is answered by a mean of v channels."""
        whole = (self.qkv.out_features - self.proj.in_features) // 2
        parts = self.qkv(x).split((self.proj.in_features, whole, whole), dim=-1)
        q, k, v = (by_head(part, self.groups) for part in parts)
        scale = (x.shape[1] if self.dynamic_scale else self.head_dim) ** -0.5
        weights = ((q * scale).mT @ k).softmax(dim=-1)  # (B, H, d_q, d_k)
        out: Tensor = self.proj((weights @ v.mT).mT.transpose(1, 2).flatten(-2))
        return out


class ChannelAdapter(_PartialAdapter):
    """DaViT's: rows of the weights, and with them channels of the projection, go one by one."""

    module_classes = (ChannelAttention, SlimChannelAttention)
    reason = OVER_CHANNELS

    def made(self, module: Any) -> tuple[tuple[str, int], ...]:
        """Behind q."""
        return (("qkv", (module.qkv.out_features - module.proj.in_features) // 2),)

    def flops(self, module: Any, input_shape: tuple[int, ...], widths: Mapping[UnitKind, Any]) -> Any:
        batch, tokens, dim = input_shape
        heads = self.heads(module)
        answering = (module.qkv.out_features - module.proj.in_features) // (2 * heads)
        each = dim + module.proj.out_features + 2 * answering
        return batch * tokens * heads * widths["v"] * each

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> nn.Module:
        # Its scale belongs to the weights and stays.
        module.__class__ = self.module_classes[1]
        slim: nn.Module = module
        return slim


class ChannelV2Adapter(ChannelAdapter):
    """Of the second version, rows of the weights are q's."""

    module_classes = (ChannelAttentionV2, SlimChannelAttentionV2)

    def heads(self, module: Any) -> int:
        """By another name."""
        heads: int = module.groups
        return heads

    def made(self, module: Any) -> tuple[tuple[str, int], ...]:
        """In front."""
        return (("qkv", 0),)


def _width(module: nn.Module, projection: str, heads: int) -> int:
    return int(module.get_parameter(f"{projection}.weight").shape[1]) // heads


PARTIAL_ATTENTION = (LinearSelfAdapter(), OutlookAdapter(), ChannelAdapter(), ChannelV2Adapter())
