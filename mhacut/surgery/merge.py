"""Merging of tokens: in each block, those that resemble others most are averaged into them.

Bipartite soft matching, from "Token Merging: Your ViT But Faster" (arXiv 2210.09461), with a fixed number of
merges per block, so that every shape is known beforehand, and without scatter, which runtimes lack or run
slowly. The class token and others before the patches are never merged.

Three things differ from ToMe; on an ImageNet ViT-Ti with half its FLOPs, they reduce the divergence to two
fifths:

- Tokens are compared as they stand in the residual stream, not by their keys: matches then do not depend on
  the basis and the width of q and k, which pruning changes.
- Tokens have weights: their size, times the root of the attention that the class token pays to each of their
  patches. Cheapest merges come first, by Ward's criterion, and averages are weighted: tokens that stand for
  many patches, or get much attention, change little. (The weight is the size alone if no class token is read,
  or q and k have norms.)
- Averages keep the mean norm of what is averaged, as in "Token Fusion" (arXiv 2312.01026).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Match(NamedTuple):
    """Which tokens are merged into which, for a batch of images; tokens are counted after the prefix.

    Every second token may be merged: set A. The others, including the first, may receive: set B.
    """

    merged: Tensor
    """Tokens of A that are merged, [B, r]."""
    kept: Tensor
    """Tokens of A that are not, ascending, [B, |A| - r]."""
    receivers: Tensor
    """For each merged token, the token of B that receives it, [B, r]."""
    weights: Tensor
    """Weights of the tokens after the prefix in an average, [B, N, 1]."""


class SizedTokens(NamedTuple):
    """Tokens with their sizes, which the blocks after a merge pass on."""

    x: Tensor
    """Tokens, [B, N, C]."""
    sizes: Tensor
    """Number of patches that each stands for, [B, N, 1]."""

    def bias(self) -> Tensor:
        """Return the logarithm of the sizes, to be added to the logits of attention, [B, 1, 1, N]."""
        return self.sizes.log()[:, None, None, :, 0]


FLOOR = 0.1
"""Attention that is added to all tokens, so that none has weight 0; attention is 1 on average over tokens."""


def weigh(sizes: Tensor, attention: Tensor | None) -> Tensor:
    """Return the weights of tokens, [B, N, 1].

    Args:
        sizes: number of patches that each stands for, [B, N, 1].
        attention: that the class token pays to each patch in them, 1 on average over tokens, [B, N, 1]; None
            where there is no such token.
    """
    return sizes if attention is None else sizes * (attention + FLOOR).sqrt()


def match(x: Tensor, weights: Tensor, count: int, prefix: int) -> Match:
    """Match the ``count`` tokens of set A whose merge into their best token of set B costs least.

    The cost is Ward's, the growth of the sum of squares within groups, on directions: for tokens of weights
    v and w, ``v * w / (v + w) * (1 - cosine)``.

    Args:
        x: tokens, [B, N, C].
        weights: of those behind the prefix, [B, N - prefix, 1].
        count: number of tokens to merge, at most half of those behind the prefix.
        prefix: number of first tokens that are left out.
    """
    with full_precision(x):
        directions = F.normalize(at_least_float32(x[:, prefix:]), dim=-1)
        far = 1 - directions[:, 1::2] @ directions[:, ::2].mT  # (B, |A|, |B|)
        weights = at_least_float32(weights)
        a, b = weights[:, 1::2], weights[:, ::2].mT
        cost, nearest = (far.clamp_min(0) * (a * b / (a + b))).min(-1)  # (B, |A|)
    # Sorted by topk: exporters know no sort.
    order = cost.topk(cost.shape[1], dim=-1, largest=False).indices
    merged, rest = order[:, :count], order[:, count:]  # (B, r), (B, |A| - r)
    # Back in their order, because the next block splits tokens by it.
    kept = rest.topk(rest.shape[1], dim=-1, largest=False).values
    return Match(merged, kept, nearest.gather(1, merged), weights)


def merge(tokens: SizedTokens, found: Match, prefix: int) -> SizedTokens:
    """Average merged tokens, and their norms, into those that receive them, by the weights of the match.

    Args:
        tokens: N tokens.
        found: the match.
        prefix: number of first tokens, which stay.

    Returns:
        The N - r tokens that are left: prefix, rest of A, B.
    """
    x, sizes = tokens
    a, size_a = x[:, prefix:][:, 1::2], sizes[:, prefix:][:, 1::2]
    rest, rest_sizes, weights = map(at_least_float32, (x[:, prefix:], sizes[:, prefix:], found.weights))
    # What adds up when tokens are merged.
    sums = torch.cat((weights * rest, weights * rest.norm(dim=-1, keepdim=True), weights, rest_sizes), -1)
    receives = (
        found.receivers[:, None, :] == torch.arange(rest[:, ::2].shape[1], device=x.device)[None, :, None]
    )  # (B, |B|, r)
    with full_precision(x):
        sums = sums[:, ::2] + receives.to(sums.dtype) @ _taken(sums[:, 1::2], found.merged)
    summed, norm, weight, new_size = sums.split((x.shape[-1], 1, 1, 1), dim=-1)
    received = (F.normalize(summed, dim=-1) * (norm / weight)).to(x.dtype)
    return SizedTokens(
        torch.cat((x[:, :prefix], _taken(a, found.kept), received), 1),
        torch.cat((sizes[:, :prefix], _taken(size_a, found.kept), new_size.to(sizes.dtype)), 1),
    )


def _taken(tokens: Tensor, places: Tensor) -> Tensor:
    """Return ``tokens`` [B, N, C] at ``places`` [B, n], [B, n, C]."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


def at_least_float32(x: Tensor) -> Tensor:
    """Return half precision as float32: float16 overflows in weighted sums, bfloat16 rounds sizes."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def full_precision(x: Tensor) -> Any:
    """Context in which autocast rounds neither cosines, of which many would be equal, nor averages."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class Matcher(nn.Module):
    """The matches of a block, as a separate module, so that they can be read and set from outside."""

    def __init__(self, count: int, prefix: int, by_attention: bool) -> None:
        """Take the number of tokens to merge, that of protected ones, and whether attention weighs them."""
        super().__init__()
        self.count, self.prefix, self.by_attention = count, prefix, by_attention

    def forward(self, x: Tensor, sizes: Tensor, attention: Tensor | None) -> Match:
        """Match tokens; of fewer patches than planned for, at most half are merged.

        Args:
            x: tokens, [B, N, C].
            sizes: of them, [B, N, 1].
            attention: of the class token to those behind the prefix (:func:`weigh`).
        """
        weights = weigh(sizes[:, self.prefix :], attention)
        count = min(self.count, (int(x.shape[1]) - self.prefix) // 2)
        return match(x.detach(), weights.detach(), count, self.prefix)
