"""Classes of ``model.py``, the code by which timm opens a pruned model without mhacut.

:mod:`mhacut.exporting.timm_code` copies this module and token merging into ``model.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from timm.models import load_state_dict
from torch import Tensor, nn

from mhacut.surgery.token_merging import SizedTokens, match, merge, weigh


class SlimAttention:
    """Mixin for attention whose q/k and v have different widths, ``qk`` and ``v`` per head."""

    output_tokens = None  # number of first tokens that have queries; None for all
    weighs_tokens = False  # whether the layer also returns the attention of the class token

    def forward(self: Any, x: Tensor, attn_mask: Any = None, is_causal: Any = False, mask: Any = None) -> Any:
        widths = self.num_heads * self.qk, self.num_heads * self.v
        if self.qkv is None:
            q, (k, v) = self.q(x[:, : self.output_tokens]), self.kv(x).split(widths, dim=-1)
        else:
            q, k, v = self.qkv(x).split((widths[0], *widths), dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if hasattr(self, "_get_rel_pos_bias"):  # Swin
            attn_mask = self._get_rel_pos_bias()
            if mask is not None:  # of shifted windows
                attn_mask = (attn_mask + mask[:, None]).repeat(len(q) // len(mask), 1, 1, 1)
        dropout = self.attn_drop.p * self.training
        y = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, scale=self.scale)
        norm = getattr(self, "norm", nn.Identity())
        y = self.proj_drop(self.proj(norm(y.transpose(1, 2).flatten(2))))
        if not self.weighs_tokens:
            return y
        logits = (q[:, :, :1] * self.scale) @ k.mT
        return y, (logits if attn_mask is None else logits + attn_mask).softmax(-1)[:, :, 0]


class SlimBlock:
    """Mixin for a block that merges ``merged`` tokens, or computes only the first ``output_tokens``."""

    merged = prefix = 0
    output_tokens = None
    returns_sizes = False

    def forward(self: Any, x: Any) -> Any:
        sized = x if isinstance(x, SizedTokens) else SizedTokens(x, x.new_ones(*x.shape[:2], 1))
        bias = sized.bias() if isinstance(x, SizedTokens) else None
        y, cls_weights = self.attn(self.norm1(sized.x), attn_mask=bias), None
        if isinstance(y, tuple):
            y, cls_weights = y
        sized = sized._replace(x=sized.x[:, : self.output_tokens] + self.drop_path1(self.ls1(y)))
        if self.merged:
            weights = weigh(sized.sizes, None if cls_weights is None else cls_weights.detach(), self.prefix)
            sized = merge(sized, match(sized.x.detach(), weights, self.merged, self.prefix), self.prefix)
        x = sized.x + self.drop_path2(self.ls2(self.mlp(self.norm2(sized.x))))
        return sized._replace(x=x) if self.returns_sizes else x


class SlimViT:
    """Mixin for a ViT whose head averages merged tokens by their numbers of patches."""

    def forward_features(self: Any, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Any:
        x = self.blocks(self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x)))))
        return x._replace(x=self.norm(x.x)) if isinstance(x, SizedTokens) else self.norm(x)

    def pool(self: Any, x: Any, pool_type: str | None = None) -> Tensor:
        if isinstance(x, Tensor):
            return super().pool(x, pool_type)  # type: ignore[misc, no-any-return]
        first = 0 if self.pool_include_prefix else self.num_prefix_tokens
        return (x.x * x.sizes)[:, first:].sum(1) / x.sizes[:, first:].sum(1)  # type: ignore[no-any-return]


def change(model: nn.Module, name: str, mixin: type | None = None, **attributes: Any) -> None:
    layer = model.get_submodule(name)
    if mixin is not None:
        layer.__class__ = type(mixin.__name__, (mixin, type(layer)), {})
    for key, value in attributes.items():
        setattr(layer, key, value)


def load(model: nn.Module, weights: Path) -> nn.Module:
    """Load ``weights``, which state the width of each layer."""
    tensors = load_state_dict(str(weights))
    for name, tensor in tensors.items():
        layer, key = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        old = getattr(layer, key)
        if old.shape != tensor.shape:
            setattr(layer, key, nn.Parameter(old.new_empty(tensor.shape)))
        if isinstance(layer, nn.Linear) and key == "weight":
            layer.out_features, layer.in_features = tensor.shape
    model.load_state_dict(tensors)
    return model.eval()
