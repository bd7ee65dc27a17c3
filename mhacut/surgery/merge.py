"""Merging of tokens: in each block, those that resemble others most are averaged into them.

Bipartite soft matching, from "Token Merging: Your ViT But Faster" (arXiv 2210.09461), with a fixed number of
merges per block, so that every shape is known beforehand, and without scatter, which runtimes lack or run
slowly. The class token and others before the patches are never merged.

ToMe compares tokens by their keys. Here they are compared as they stand in the residual stream: matches then
do not depend on the basis and the width of q and k, which pruning changes.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Match(NamedTuple):
    """Which tokens are merged into which, for a batch of images; tokens are counted behind the prefix.

    Every second token may be merged: set A. The others, the first among them, may receive: set B.
    """

    merged: Tensor
    """Tokens of A that are merged, [B, r]."""
    kept: Tensor
    """Tokens of A that are not, ascending, [B, |A| - r]."""
    receivers: Tensor
    """For each merged token, the token of B that receives it, [B, r]."""


class SizedTokens(NamedTuple):
    """Tokens with their sizes, which blocks behind a merge pass on."""

    x: Tensor
    """Tokens, [B, N, C]."""
    sizes: Tensor
    """Number of patches that each stands for, [B, N, 1]."""

    def bias(self) -> Tensor:
        """Return the logarithm of the sizes, to be added to the logits of attention, [B, 1, 1, N]."""
        return self.sizes.log()[:, None, None, :, 0]


def match(keys: Tensor, count: int, prefix: int) -> Match:
    """Match the ``count`` tokens of set A that resemble one of set B most with that one.

    Args:
        keys: what tokens are compared by, by the cosine, [B, N, d].
        count: number of tokens to merge, at most half of those behind the prefix.
        prefix: number of first tokens that are left out.
    """
    with _full_precision(keys):
        keys = F.normalize(keys[:, prefix:], dim=-1)
        a, b = keys[:, 1::2], keys[:, ::2]
        similarity, nearest = (a @ b.mT).max(-1)  # (B, |A|)
    # Sorted by topk: exporters know no sort.
    order = similarity.topk(a.shape[1], dim=-1).indices
    merged, rest = order[:, :count], order[:, count:]  # (B, r), (B, |A| - r)
    # Back in their order, because the next block splits tokens by it.
    kept = rest.topk(rest.shape[1], dim=-1, largest=False).values
    return Match(merged, kept, nearest.gather(1, merged))


def merge(tokens: SizedTokens, found: Match, prefix: int) -> SizedTokens:
    """Average merged tokens into those that receive them, each with the weight of its size.

    Args:
        tokens: N tokens.
        found: the match.
        prefix: number of first tokens, which stay.

    Returns:
        The N - r tokens that are left: prefix, rest of A, B.
    """
    x, sizes = tokens
    rest, rest_sizes = x[:, prefix:], sizes[:, prefix:]
    a, b = rest[:, 1::2], rest[:, ::2]
    size_a, size_b = rest_sizes[:, 1::2], rest_sizes[:, ::2]
    columns = torch.arange(b.shape[1], device=x.device)[None, :, None]  # (1, |B|, 1)
    receives = (found.receivers[:, None, :] == columns).to(x.dtype)  # (B, |B|, r)
    moved_size = _taken(size_a, found.merged)  # (B, r, 1)
    moved = moved_size * _taken(a, found.merged)  # (B, r, C)
    with _full_precision(x):
        sums = receives @ torch.cat((moved, moved_size), -1)  # (B, |B|, C + 1)
    new_size = size_b + sums[..., -1:]
    received = (size_b * b + sums[..., :-1]) / new_size
    return SizedTokens(
        torch.cat((x[:, :prefix], _taken(a, found.kept), received), 1),
        torch.cat((sizes[:, :prefix], _taken(size_a, found.kept), new_size), 1),
    )


def _taken(tokens: Tensor, places: Tensor) -> Tensor:
    """Return ``tokens`` [B, N, C] at ``places`` [B, n], [B, n, C]."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


def _full_precision(x: Tensor) -> Any:
    """Context in which autocast rounds neither cosines, of which many would be equal, nor averages."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class Matcher(nn.Module):
    """The matches of a block, as a module of their own, so that they can be seen and given from outside."""

    def __init__(self, count: int, prefix: int) -> None:
        """Take the number of tokens to merge, and that of protected tokens."""
        super().__init__()
        self.count, self.prefix = count, prefix

    def forward(self, x: Tensor) -> Match:
        """Match tokens [B, N, C]; of fewer patches than planned for, at most half are merged."""
        count = min(self.count, (int(x.shape[1]) - self.prefix) // 2)
        return match(x.detach(), count, self.prefix)
