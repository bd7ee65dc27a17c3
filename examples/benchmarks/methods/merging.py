"""Merging of tokens by the rule of ToMe (arXiv 2210.09461) on a plain timm ViT: own reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn


def merge(x: Tensor, keys: Tensor, sizes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Merge the ``count`` even tokens whose keys have the most similar odd ones into these.

    The first token stays; at most half of the others can go.

    Args:
        x: [B, N, C].
        keys: [B, N, d], what tokens are compared by.
        sizes: number of tokens that each stands for, [B, N].
        count: tokens to merge.

    Returns:
        Averages weighted by size, [B, N - count, C], and their sizes.
    """
    keys = keys / keys.norm(dim=-1, keepdim=True)
    similarity = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)  # (B, even, odd)
    similarity[:, 0] = -math.inf
    best, partner = similarity.max(-1)
    order = best.topk(best.shape[1]).indices
    gone, others = order[:, : min(count, best.shape[1] - 1)], order[:, min(count, best.shape[1] - 1) :]
    stay = others.topk(others.shape[1], largest=False).values  # ascending, so that the first stays first
    images = torch.arange(len(x))[:, None]
    target = partner.gather(1, gone)

    def summed(values: Tensor) -> Tensor:
        even, odd = values[:, ::2], values[:, 1::2]
        together = odd.clone().index_put_((images, target), even[images, gone], accumulate=True)
        return torch.cat([even[images, stay], together], 1)

    merged_sizes = summed(sizes)
    return summed(x * sizes[..., None]) / merged_sizes[..., None], merged_sizes


class _Captured:
    """Forward hook that keeps the last output: an object, for it follows its module into a copy."""

    output: Tensor

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.output = output


class MergingBlock(Block):
    """timm's block, which merges tokens between attention and MLP and hands their sizes on."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        sizes = torch.ones(x.shape[:2]) if self.first else self.shared.sizes
        # Proportional attention: a token that stands for n counts n times.
        x = x + self.ls1(self.attn(self.norm1(x), attn_mask=sizes.log()[:, None, None]))
        width = (self.attn.qkv.out_features - self.attn.proj.in_features) // 2
        keys = self.captured.output[..., width : 2 * width].unflatten(-1, (self.attn.num_heads, -1)).mean(-2)
        x, self.shared.sizes = merge(x, keys, sizes, self.merged)
        return x + self.ls2(self.mlp(self.norm2(x)))


class _Shared:
    sizes: Tensor


def merge_tokens(model: Any, merged: Sequence[int]) -> None:
    """Make a ViT with a class token merge so many tokens in each of its blocks, in place.

    Raises:
        SystemExit: it is none, or has blocks of another kind.
    """
    if model.global_pool != "token" or model.num_prefix_tokens != 1:
        raise SystemExit("merging needs a ViT that reads its class token and has no other prefix tokens")
    if any(type(block) is not Block for block in model.blocks):
        raise SystemExit("merging needs timm's plain blocks")
    shared = _Shared()
    for index, (block, count) in enumerate(zip(model.blocks, merged, strict=True)):
        block.__class__ = MergingBlock
        block.first, block.merged, block.shared, block.captured = index == 0, count, shared, _Captured()
        block.attn.qkv.register_forward_hook(block.captured)


def merged_of(model: nn.Module) -> list[int]:
    """How many tokens each block merges; empty where none does."""
    return [module.merged for module in model.modules() if isinstance(module, MergingBlock)]
