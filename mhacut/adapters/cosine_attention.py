"""Attention by cosines, in windows: Swin V2 and Swin V2-CR.

q and k of a head are brought to unit length before the product. A channel that is zero in both is as good as
gone, so that both are gated; mixing kept ones would change the lengths, so they are chosen. v is free.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from timm.models.swin_transformer_v2 import WindowAttention
from timm.models.swin_transformer_v2_cr import WindowMultiHeadAttention
from torch import Tensor

from mhacut.adapters.attend import attend
from mhacut.adapters.base import ActivationHook, Unit
from mhacut.adapters.fused import FusedAdapter, FusedForward

_MOST = math.log(100)
"""Of the logarithm of the learned scale."""


class CosineForward(FusedForward):
    """How the slim twins compute."""

    def forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[windows, N, C] to [windows, N, C]; ``mask``, [windows per image, N, N], is added to logits."""
        q, k, v = self.heads_of(x)
        bias = self.position_bias()  # (1, H, N, N)
        if mask is not None:
            bias = (bias + mask.unsqueeze(1)).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        scale = self.logit_scale.view(-1, 1, 1).clamp(max=_MOST).exp()
        out = attend(
            F.normalize(q, dim=-1) * scale,
            F.normalize(k, dim=-1),
            v,
            scale=1.0,
            fused=False,
            attn_mask=bias,
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )
        projected: Tensor = self.finish(out.transpose(1, 2).flatten(-2))
        return projected


class SlimWindowAttentionV2(CosineForward, WindowAttention):  # type: ignore[misc]
    """Swin V2's attention at any widths."""

    def position_bias(self: Any) -> Tensor:
        """In 0..16, [1, H, N, N]."""
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        bias: Tensor = 16 * table[self.relative_position_index].sigmoid()  # (N, N, H)
        return bias.movedim(-1, 0).unsqueeze(0)


class SlimWindowMultiHeadAttention(CosineForward, WindowMultiHeadAttention):  # type: ignore[misc]
    """Swin V2-CR's attention at any widths."""

    def position_bias(self: Any) -> Tensor:
        """[1, H, N, N]."""
        bias: Tensor = self._relative_positional_encodings()
        return bias


class CosineAdapter(FusedAdapter):
    """One ``qkv``, with its bias in parts or not."""

    def qk(self, name: str, module: Any) -> Unit | str:
        """Gated in q and in k, so that neither counts in a length."""
        plain = super().qk(name, module)
        assert isinstance(plain, Unit)
        return replace(
            plain,
            scale_axes=plain.axes,
            hooks={name: _of_unit_length(hook, plain) for name, hook in plain.hooks.items()},
            mixing="select",
            softmax_scaled=False,
        )


def _of_unit_length(hook: ActivationHook, unit: Unit) -> ActivationHook:
    def normalised(module: Any, x: Tensor) -> Tensor:
        x = x if hook.then is None else hook.then(module, x)
        x = x[..., hook.offset : hook.offset + unit.heads * unit.width]
        return F.normalize(x.reshape(*x.shape[:-1], unit.heads, unit.width), dim=-1).flatten(-2)

    return replace(hook, offset=0, then=normalised)


COSINE_ATTENTION = (
    CosineAdapter(WindowAttention, SlimWindowAttentionV2),
    CosineAdapter(WindowMultiHeadAttention, SlimWindowMultiHeadAttention),
)
