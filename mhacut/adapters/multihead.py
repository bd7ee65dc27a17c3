"""Adapter of ``nn.MultiheadAttention``, the attention of torchvision and open_clip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhacut.adapters.attend import attend, by_head, merged, weights_of
from mhacut.adapters.base import ActivationHook, ChannelAxis, Layer
from mhacut.adapters.softmax import Softmax
from mhacut.plan import UnitKind


class MultiheadTwin(nn.Module):
    """Forward pass of ``nn.MultiheadAttention`` after a cut.

    It calls ``out_proj`` as a module, so that hooks on ``out_proj`` run.
    """

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        sizes = [heads * width for heads, width in map(self.spec.sizes(self).get, "qkv")]
        weights = self.in_proj_weight.split(sizes)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
        q, k, v = (
            by_head(F.linear(x, *projection), self.num_heads)
            for x, *projection in zip((query, key, value), weights, biases, strict=True)
        )
        mask = _additive(attn_mask, q)
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q)[:, None, None]
            mask = padding if mask is None else mask + padding
        scale, dropout = q.shape[-1] ** -0.5, self.dropout if self.training else 0.0
        attention = None
        if need_weights:
            attention = F.dropout(weights_of(q, k, scale, mask), dropout)
            y = attention @ v
            attention = attention.mean(1) if average_attn_weights else attention
        else:
            y = attend(q, k, v, scale=scale, fused=True, attn_mask=mask, dropout_p=dropout)
        y = self.out_proj(merged(y))
        return (y if self.batch_first else y.transpose(0, 1)), attention


def _additive(mask: Tensor | None, like: Tensor) -> Any:
    """Convert an attention mask to a bias on the logits. In a bool mask, True excludes a key."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)


@dataclass(eq=False)
class Multihead(Softmax):
    """``nn.MultiheadAttention``, whose ``in_proj_weight`` has the rows [q | k | v], each ordered by head."""

    mixins: tuple[type, ...] = (MultiheadTwin,)
    read_by: str = "out_proj"
    result: str = "out_proj"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mask_name = "attn_mask"

    def serves(self, module: Any) -> bool:
        return module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn

    def sizes(self, module: Any) -> dict[str, tuple[int, int]]:
        heads, v = self.v_size(module)
        qk = heads, (len(module.in_proj_weight) - heads * v) // (2 * heads)
        return {"q": qk, "k": qk, "v": (heads, v)}

    def parts(self, module: Any) -> dict[str, Any]:
        return {}  # no module writes q, k and v

    def offset(self, module: Any, letter: str) -> int:
        heads, width = self.sizes(module)["q"]
        return "qkv".index(letter) * heads * width

    def axes(self, module: Any, letter: str) -> tuple[ChannelAxis, ...]:
        names = ("in_proj_weight", "in_proj_bias")[: 1 if module.in_proj_bias is None else 2]
        return tuple(ChannelAxis(name, 0, self.offset(module, letter)) for name in names)

    def hook(self, module: Any, letter: str) -> ActivationHook:
        return ActivationHook("", "input", self.offset(module, letter), then=_projected)

    def describe(self, name: str, module: Any) -> Layer:
        return replace(super().describe(name, module), channel_dim=-1)

    def prepare(self, module: Any) -> None:
        self.resize(module, {})

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        super().resize(module, widths)
        # Keeps nn.TransformerEncoderLayer from its fast path, which expects q, k and v of the dense width.
        module._qkv_same_embed_dim = False

    def fix_shared_modules(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False  # a part of the fast path


def _projected(m: Any, x: Tensor) -> Tensor:
    rows = F.linear(x, m.in_proj_weight, m.in_proj_bias)
    return rows if m.batch_first else rows.transpose(0, 1)


MULTIHEAD = Multihead(nn.MultiheadAttention)
