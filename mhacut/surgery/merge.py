"""Merging of tokens: in each block, those that resemble others most are averaged into them.

Bipartite soft matching, from "Token Merging: Your ViT But Faster" (arXiv 2210.09461), with a fixed number of
merges per block, so that every shape is known beforehand, and without scatter, which runtimes lack or run
slowly. The class token and others before the patches are never merged.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Match(NamedTuple):
    """Which tokens are merged into which, for a batch of images; tokens are counted behind the prefix.

    Every second token, from the first on, may be merged: set A. The others, set B, may receive.
    """

    merged: Tensor
    """Tokens of A that are merged, [B, r]."""
    kept: Tensor
    """Tokens of A that are not, ascending, [B, |A| - r]."""
    receives: Tensor
    """For each merged token, 1 at the token of B that receives it and 0 elsewhere, [B, |B|, r]."""


def match(keys: Tensor, count: int, prefix: int) -> Match:
    """Match the ``count`` tokens of set A that resemble one of set B most with that one.

    Args:
        keys: what tokens are compared by, by the cosine, [B, N, d].
        count: number of tokens to merge, at most half of those behind the prefix.
        prefix: number of first tokens that are left out.
    """
    keys = F.normalize(keys[:, prefix:], dim=-1)
    a, b = keys[:, ::2], keys[:, 1::2]
    similarity, nearest = (a @ b.mT).max(-1)  # (B, |A|)
    merged = similarity.topk(count, dim=-1).indices  # (B, r)
    # Not the rest of the same sort: the next block splits tokens by their order.
    is_merged = (merged[:, :, None] == torch.arange(a.shape[1], device=keys.device)).any(1)  # (B, |A|)
    place = torch.arange(a.shape[1], device=keys.device) + is_merged * a.shape[1]
    kept = place.topk(a.shape[1] - count, dim=-1, largest=False).indices  # (B, |A| - r)
    receiver = nearest.gather(1, merged)  # (B, r)
    columns = torch.arange(b.shape[1], device=keys.device)[None, :, None]  # (1, |B|, 1)
    return Match(merged, kept, (receiver[:, None, :] == columns).to(keys.dtype))


def merge(x: Tensor, sizes: Tensor, found: Match, prefix: int) -> tuple[Tensor, Tensor]:
    """Average merged tokens into those that receive them, each with the weight of its size.

    Args:
        x: tokens, [B, N, C].
        sizes: number of patches that each stands for, [B, N, 1].
        found: the match.
        prefix: number of first tokens, which stay.

    Returns:
        The tokens that are left, [B, N - r, C], and their sizes: prefix, rest of A, B.
    """
    first, rest = x[:, :prefix], x[:, prefix:]
    a, b = rest[:, ::2], rest[:, 1::2]
    size_a, size_b = sizes[:, prefix::2], sizes[:, prefix + 1 :: 2]
    moved_size = _taken(size_a, found.merged)  # (B, r, 1)
    moved = moved_size * _taken(a, found.merged)  # (B, r, C)
    sums = found.receives @ torch.cat((moved, moved_size), -1)  # (B, |B|, C + 1)
    new_size = size_b + sums[..., -1:]
    received = (size_b * b + sums[..., :-1]) / new_size
    tokens = torch.cat((first, _taken(a, found.kept), received), 1)
    return tokens, torch.cat((sizes[:, :prefix], _taken(size_a, found.kept), new_size), 1)


def _taken(tokens: Tensor, places: Tensor) -> Tensor:
    """Return ``tokens`` [B, N, C] at ``places`` [B, n], [B, n, C]."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


class Matcher:
    """Matches the keys of one attention layer, and keeps the match for the block around it."""

    def __init__(self, count: int, prefix: int) -> None:
        """Take the number of tokens to merge, and that of protected tokens."""
        self.count, self.prefix = count, prefix
        self._found: Match | None = None

    def __call__(self, keys: Tensor) -> None:
        """Match keys [B, H, N, d], by their mean over heads."""
        self._found = match(keys.mean(1), self.count, self.prefix)

    def take(self) -> Match:
        """Return the match of the last call, and forget it."""
        found, self._found = self._found, None
        assert found is not None, "the attention layer did not run"
        return found


class Sizes:
    """Sizes of tokens between two blocks: written by the first, read by the second."""

    value: Tensor | None = None
    """[B, N, 1]."""

    def last(self) -> Tensor:
        """Return the sizes of the last forward pass, [B, N, 1]."""
        assert self.value is not None, "the block before did not run"
        return self.value

    def as_bias(self) -> Tensor:
        """Return the logarithm of the sizes, to be added to the logits of attention, [B, 1, 1, N]."""
        return self.last().log()[:, None, None, :, 0]

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: a copy starts anew, as sizes belong to one forward pass."""
        return {}
