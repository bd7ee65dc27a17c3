"""softmax(q k^T * scale) v, where q/k and v may differ in width, by the fastest of several computations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import maybe_add_mask, resolve_self_attn_mask
from torch import Tensor

EXPLICIT_MAX_LOGITS = 500_000
"""Number of logits (batch * heads * tokens^2) up to which explicit products beat padding on a CPU."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    fused: bool,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Return the attention output, [B, H, N, d_v].

    With d_qk != d_v, PyTorch's CPU kernel takes a slow path, so small inputs take explicit products and large
    ones zero-pad the smaller width.

    Args:
        q: [B, H, N, d_qk]; k likewise.
        k: [B, H, M, d_qk].
        v: [B, H, M, d_v].
        scale: factor on the logits; explicit, because SDPA would derive another from the width it is given.
        fused: allow ``scaled_dot_product_attention``.
        attn_mask: boolean (True attends) or additive, broadcastable to [B, H, N, M].
        dropout_p: on the attention weights; 0 outside training.
    """
    d_qk, d_v = q.shape[-1], v.shape[-1]
    unequal_on_cpu = d_qk != d_v and q.device.type == "cpu"
    if not fused or (unequal_on_cpu and _explicit_is_faster(q, k)):
        logits = (q * scale) @ k.transpose(-2, -1)  # (B, H, N, M)
        logits = maybe_add_mask(logits, resolve_self_attn_mask(q.shape[-2], logits, attn_mask))
        return F.dropout(logits.softmax(dim=-1), dropout_p) @ v
    if unequal_on_cpu:
        width = max(d_qk, d_v)
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale)
    return out[..., :d_v]


def attend_as(module: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Return the output of :func:`attend` with scale, kernel and dropout of ``module``, [B, H, N, d_v].

    A module without a ``scale`` has scaled q itself. Where k and v have fewer heads than q, each serves
    several heads of q that follow one another.
    """
    if k.shape[1] != q.shape[1]:
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    return attend(
        q,
        k,
        v,
        scale=getattr(module, "scale", 1.0),
        fused=getattr(module, "fused_attn", False),
        attn_mask=attn_mask,
        dropout_p=module.attn_drop.p if module.training and hasattr(module, "attn_drop") else 0.0,
    )


def _explicit_is_faster(q: Tensor, k: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True  # the batch may be symbolic; exporters decompose SDPA anyway
    return q[..., 0].numel() * k.shape[-2] <= EXPLICIT_MAX_LOGITS
