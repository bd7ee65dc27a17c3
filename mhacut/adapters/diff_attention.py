"""Differential attention: ``DiffAttention`` weighs v by the difference of two softmaxes.

The two are heads of q and k like any others, and free. v channels are normalised within their head and stay.
"""

from __future__ import annotations

from typing import Any

from timm.layers import DiffAttention
from torch import Tensor

from mhacut.adapters.base import Unit
from mhacut.adapters.fused import FusedAdapter, FusedForward, by_head, head_count

NORM_WITHIN = "a norm before the projection runs over the v channels of a head"


class DiffForward(FusedForward):
    """How the slim twins compute."""

    def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, C] to [B, N, C]."""
        qkv, v_dim = self.project(x), self.proj.in_features
        qk_dim = (qkv.shape[-1] - v_dim) // 2
        out = self.difference(*qkv.split((qk_dim, qk_dim, v_dim), dim=-1), attn_mask, is_causal)
        projected: Tensor = self.finish(self.norm(out))
        return projected

    def difference(
        self: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """Of q, k and v, each [B, N, channels], the heads beside each other, [B, N, H * d_v]."""
        heads = head_count(self)
        q, k = self.q_norm(by_head(q, 2 * heads)), self.k_norm(by_head(k, 2 * heads))
        v = by_head(v, heads)
        first, second = (
            self.weigh(q[:, part::2], k[:, part::2], v, attn_mask, is_causal=is_causal) for part in (0, 1)
        )
        out = first - self._compute_lambda().type_as(q) * second
        normed: Tensor = self.sub_norm(out.view(*out.shape[:2], heads, -1)) * (1 - self.lambda_init)
        return normed.flatten(2)


class SlimDiffAttention(DiffForward, DiffAttention):  # type: ignore[misc]
    """timm's, at any width of q/k."""


class DiffAdapter(FusedAdapter):
    """Rows of q, and of k, are those of two heads for each of v, which are twice as wide."""

    def heads(self, module: Any) -> int:
        """Of q, and of k."""
        return 2 * head_count(module)

    def v(self, name: str, module: Any) -> Unit | str:
        """Left whole."""
        return NORM_WITHIN


DIFF_ATTENTION = (DiffAdapter(DiffAttention, SlimDiffAttention),)
