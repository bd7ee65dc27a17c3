"""Softmax attention whose q/k and v have different widths, and reshapes of tokens, maps and heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import maybe_add_mask, resolve_self_attn_mask
from torch import Tensor


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
    """Return softmax(q k^T * scale) v, [B, H, N, d_v]; q and k have d_qk channels per head, v has d_v."""
    # PyTorch's fused CPU kernel is fast only if d_qk == d_v. Otherwise logits are computed for a few images
    # at a time. For large images, and in training, zeros pad the smaller width.
    d_qk, d_v = q.shape[-1], v.shape[-1]
    unequal_on_cpu = d_qk != d_v and q.device.type == "cpu"
    if not fused or (unequal_on_cpu and products_are_faster(q, k)):
        return F.dropout(weights_of(q, k, scale, attn_mask), dropout_p) @ v
    if unequal_on_cpu and (at_once := _images_at_once(q, k)):
        each = attn_mask is not None and attn_mask.dim() == q.dim() and len(attn_mask) == len(q)
        parts = [x.split(at_once) for x in (q, k, v)]
        masks = attn_mask.split(at_once) if attn_mask is not None and each else [attn_mask] * len(parts[0])
        return torch.cat(
            [
                F.dropout(weights_of(q_, k_, scale, mask), dropout_p) @ v_
                for q_, k_, v_, mask in zip(*parts, masks, strict=True)
            ]
        )
    if unequal_on_cpu:  # zeros add nothing to the products
        if d_qk < d_v:
            q, k = (F.pad(x, (0, d_v - d_qk)) for x in (q, k))
        else:
            v = F.pad(v, (0, d_qk - d_v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale)
    return out[..., :d_v]


def _images_at_once(q: Tensor, k: Tensor) -> int:
    """Number of images whose attention logits fit the CPU cache; 0 if the fused kernel is to be used."""
    logits = q[0].shape[:-1].numel() * k.shape[-2]
    keeps_all = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)  # for the backward pass
    return 0 if keeps_all or logits > _MAX_LOGITS else max(_LOGITS_AT_ONCE // logits, 1)


def weights_of(q: Tensor, k: Tensor, scale: float, attn_mask: Tensor | None) -> Tensor:
    logits = (q * scale) @ k.transpose(-2, -1)  # (B, H, N, M)
    logits = maybe_add_mask(logits, resolve_self_attn_mask(q.shape[-2], logits, attn_mask))
    return logits.softmax(dim=-1)


def attend_as(module: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Call :func:`attend` with the softmax scale, kernel and dropout rate of the attention ``module``."""
    # Heads of k and v may each serve several consecutive heads of q.
    if k.shape[1] != q.shape[1]:
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    return attend(
        q,
        k,
        v,
        scale=getattr(module, "scale", 1.0),  # without a scale, the module has scaled q
        fused=getattr(module, "fused_attn", False),
        attn_mask=attn_mask,
        dropout_p=module.attn_drop.p if module.training and hasattr(module, "attn_drop") else 0.0,
    )


def cls_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the attention output [B, H, N, d_v] and the attention weights of the class token [B, H, M]."""
    if module.fused_attn and not products_are_faster(q, k):
        first = weights_of(q[:, :, :1], k, module.scale, attn_mask)
        return attend_as(module, q, k, v, attn_mask), first[:, :, 0]
    weights = weights_of(q, k, module.scale, attn_mask)
    return module.attn_drop(weights) @ v, weights[:, :, 0]


def graph_is_recorded() -> bool:
    """Whether an exporter, torch.compile or the FLOP counter records the forward pass."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


FEW_LOGITS = 2**19
"""Up to this number of attention logits, an explicit softmax on the CPU is as fast as the fused kernel."""
_LOGITS_AT_ONCE, _MAX_LOGITS = 2**18, 2**22
"""Number of attention logits that fit the CPU cache, and number of logits per image above which the fused
kernel is faster."""


def products_are_faster(q: Tensor, k: Tensor) -> bool:
    if q.device.type != "cpu":
        return False
    # Exporters decompose SDPA anyway, and padding would stay in the graph.
    if graph_is_recorded():
        return True
    return q.shape[:-1].numel() * k.shape[-2] <= FEW_LOGITS


# B images, N tokens, H heads of d channels.


def by_head(x: Tensor, heads: int) -> Tensor:
    """Reshape [B, N, H * d] to [B, H, N, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merged(x: Tensor) -> Tensor:
    """Reshape [B, H, N, d] to [B, N, H * d]."""
    return x.transpose(-3, -2).flatten(-2)


def as_tokens(x: Tensor) -> Tensor:
    """Reshape [B, C, height, width] to [B, N, C]."""
    return x.flatten(2).transpose(1, 2)


def as_map(x: Tensor, size: Sequence[int]) -> Tensor:
    """Reshape [B, N, C] to [B, C, height, width], with ``size`` (height, width)."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *size)
