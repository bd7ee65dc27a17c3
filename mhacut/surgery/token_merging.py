"""Token merging on tensors: choose pairs of similar tokens and average each pair.

The method is ToMe's bipartite soft matching ("Token Merging: Your ViT But Faster", arXiv 2210.09461). Tokens
before the patches, such as the class token, are never merged. The number of merges per block is fixed for
an image size, so all shapes are known in advance. No operation is a scatter: several runtimes lack it or run
it slowly.

Three differences from ToMe reduce the divergence to two fifths on an ImageNet ViT-Ti with half its FLOPs:

- Similarity is measured on the residual stream, not on keys. Matches then do not depend on the basis and
  the width of q and k, which pruning changes.
- Every token has a weight: its size times the root of the class token's attention per patch. Merges with the
  lowest Ward cost come first and averages are weighted, so tokens that stand for many patches or receive much
  attention change little. If the head reads no class token, or q and k have norms, the weight is the size.
- An average keeps the mean norm of its tokens, as in "Token Fusion" (arXiv 2312.01026).

Names in this module: the size of a token is the number of patches that it stands for. The prefix consists of
the tokens before the patches. B is the number of images, N the number of tokens.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

ATTENTION_FLOOR = 0.1
"""Constant added to the class token's attention on each token, so that no weight is 0. The mean attention is
1."""
_MIN_NORM = 1e-12
"""Lower bound of divisors, because a token may be zero and merged tokens may cancel out."""


class Match(NamedTuple):
    """Pairs of tokens to merge, for a batch of images.

    Tokens after the prefix form set A (1, 3, 5, ...) and set B (0, 2, 4, ...). A token of A may be merged
    into a token of B.
    """

    merged: Tensor
    """Indices in set A of the tokens to merge, [B, r]."""
    kept: Tensor
    """Indices in set A of the tokens that stay, ascending, [B, |A| - r]."""
    receivers: Tensor
    """Index in set B of the partner of each merged token, [B, r]."""
    weights: Tensor
    """Weights of all tokens in a merge average, prefix included, [B, N, 1]."""


class SizedTokens(NamedTuple):
    """Tokens with the number of patches per token, which blocks pass on after a merge."""

    x: Tensor
    sizes: Tensor
    """Number of patches that each token stands for, [B, N, 1]."""
    token_of_patch: Tensor | None = None
    """For each token of the first block, the index of the current token that contains it, [B, N of the first
    block]. None if patch features are not needed. In grids, [B, rows, columns]; ``x`` and ``sizes`` have rows
    and columns in place of N."""
    positions: Tensor | None = None
    """Sines and cosines of rotary positions (P = 2 * d), or row and column for relative position biases (P =
    2): [N, P] before the first merge, then [B, N, P]. Rows of the prefix are 0. None in other models."""
    first: Tensor | None = None
    """Empty tensor [B, N of the first block, 0]: a tensor, because ``torch.jit.trace`` takes no numbers."""

    def __getitem__(self, index: Any) -> Any:
        # transformers reads the hidden state as entry 0 of a layer's output.
        return self.unmerge() if type(index) is int else self.unmerge()[index]

    def __add__(self, other: Any) -> Any:
        # YOLOS adds positions between blocks: a token gets the mean over its patches.
        if self.token_of_patch is None or not isinstance(other, Tensor):
            return self.unmerge() + other
        index = torch.arange(self.x.shape[1], device=self.x.device)[:, None]
        members = (self.token_of_patch[:, None] == index).to(other.dtype)  # (B, N, all tokens)
        mean = members @ other.expand(self.x.shape[0], -1, -1) / self.sizes
        return self._replace(x=self.x + mean)

    # Code between blocks reads a tensor with a token for every patch.
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # looked up by copy and pickle
            raise AttributeError(name)
        return getattr(self.unmerge(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def tensor_of(leaf: Any) -> Any:
            return leaf.unmerge() if isinstance(leaf, cls) else leaf

        args, kwargs = tree_map(tensor_of, (args, kwargs or {}), is_leaf=lambda leaf: isinstance(leaf, cls))
        return function(*args, **kwargs)

    def bias(self) -> Tensor:
        """Return ToMe's proportional attention: the bias of token sizes on logits, [B, 1, 1, N]."""
        return self.sizes.mT.log()[:, None]

    def unmerge(self) -> Tensor:
        """Copy merged tokens back: return a token for every token of the first block, [B, N, C]."""
        index = self.token_of_patch
        if index is None or index.dim() == 2:
            return self.x if index is None else _take_rows(self.x, index)
        rows = _take_rows(self.x.flatten(1, 2), index.flatten(1))
        return rows.reshape(*index.shape, -1)


def weigh(sizes: Tensor, cls_weights: Tensor | None, prefix: int) -> Tensor:
    """Return token weights [B, N, 1] from sizes [B, N, 1] and the class token's attention [B, H, N]."""
    sizes = at_least_float32(sizes)
    if cls_weights is None:
        return sizes
    attention_per_patch = at_least_float32(cls_weights).sum(1)[..., None] / sizes
    mean = attention_per_patch[:, prefix:].mean(1, keepdim=True)
    # Only ratios of weights matter, so the sum over heads serves as well as the mean.
    # The clamp covers a class token whose attention to all patches rounds to 0.
    return sizes * torch.add(attention_per_patch, mean.clamp_min(1e-20), alpha=ATTENTION_FLOOR).sqrt()


def match(x: Tensor, weights: Tensor, count: int, prefix: int, neighbours: bool = False) -> Match:
    """Return the ``count`` cheapest merges of an odd into an even token among tokens ``x`` [B, N, C].

    The first ``prefix`` tokens never merge. The cost of merging 2 tokens with weights v and w is Ward's for
    normalised tokens: ``(1 - cosine) / (1 / v + 1 / w)``. With ``neighbours``, only neighbours merge.
    """
    with full_precision(x):
        directions = at_least_float32(x)
        norms = torch.linalg.vector_norm(directions, dim=-1, keepdim=True)
        directions = directions / norms.clamp_min(_MIN_NORM)
        a, b, inverse_weights = directions[:, prefix + 1 :: 2], _set_b(directions, prefix), 1 / weights
        inverse_a, inverse_b = inverse_weights[:, prefix + 1 :: 2], _set_b(inverse_weights, prefix)
        cost = (1 - torch.bmm(a, b.mT)) / (inverse_a + inverse_b.mT)
    if neighbours:
        cost = _of_neighbours(cost)
    cost, nearest = cost.min(-1)  # (B, |A|)
    # topk sorts here: exporters lack sort.
    order = cost.topk(cost.shape[1], dim=-1, largest=False).indices
    merged, rest = order[:, :count], order[:, count:]  # (B, r), (B, |A| - r)
    # Ascending, because the next block splits its tokens into A and B by position.
    kept = rest.topk(rest.shape[1], dim=-1, largest=False).values
    return Match(merged, kept, nearest.gather(1, merged), weights)


def _of_neighbours(cost: Tensor) -> Tensor:
    """Make all merges infinitely costly except those of tokens side by side; ``cost`` is [B, |A|, |B|]."""
    a, b = (torch.arange(length, device=cost.device) for length in cost.shape[1:])
    right = b - a[:, None]  # token 2a + 1 lies between tokens 2a and 2a + 2
    return cost.masked_fill(right * (right - 1) != 0, torch.inf)


def merge(tokens: SizedTokens, matched: Match, prefix: int) -> SizedTokens:
    """Return N - r tokens, in the order prefix, rest of A, B. Merged tokens are weighted averages."""
    x, sizes, token_of_patch, positions, _ = tokens
    merged, kept, receivers, weights = matched
    with full_precision(x):
        x = at_least_float32(x)
        # The same norms as in match: an exported graph computes them once.
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        # All quantities that add up when tokens are merged, in one tensor.
        parts = [weights * x, weights * norms, weights, at_least_float32(sizes)]
        if positions is not None:
            # Attention of a merged token is the mean over its members if their q and k are equal and if their
            # sines and cosines are averaged by size. The averages are shorter than 1: a token that covers
            # many patches loses its fast frequencies.
            parts.append(parts[-1] * positions)
        sums = torch.cat(parts, -1)
        a, b = _take_rows(sums, torch.cat((merged, kept), 1), prefix + 1, 2), _set_b(sums, prefix)
        # A product with a 0/1 matrix in place of a scatter.
        index_in_b = torch.arange(b.shape[1], device=b.device)[:, None]
        receives = (receivers[:, None] == index_in_b).to(b.dtype)  # (B, |B|, r)
        b = torch.baddbmm(b, receives, a[:, : merged.shape[1]])
    # Unmerged tokens pass through the same division, which undoes their weighting: fewer operations.
    sums = torch.cat((sums[:, :prefix], a[:, merged.shape[1] :], b), 1)
    x, norms, weights, new_sizes, *sums_of_positions = sums.split([part.shape[-1] for part in parts], dim=-1)
    if positions is not None:
        positions = (sums_of_positions[0] / new_sizes).to(positions.dtype)
    x = x * (norms / (weights * torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(_MIN_NORM)))
    if token_of_patch is not None:
        token_of_patch = token_of_patch_after(token_of_patch, matched, prefix)
    x, sizes = x.to(tokens.x.dtype), new_sizes.to(sizes.dtype)
    return tokens._replace(x=x, sizes=sizes, token_of_patch=token_of_patch, positions=positions)


def bias_between(bias: Tensor, positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the relative position bias [B, H, N, N] between tokens at mean ``positions`` [(B,) N, 2].

    ``bias`` [1, H, M, M] belongs to the M tokens of a grid without merges. Between the offsets of this grid,
    the bias is bilinear: close to the mean over all pairs of members, for far fewer operations.
    """
    rows, columns = grid
    prefix = bias.shape[-1] - rows * columns
    down, along = (torch.arange(1 - side, side, device=bias.device) for side in grid)
    # Each offset lies between 2 patches at corners of the grid.
    query, key = (
        ((sign * down).clamp_min(0)[:, None] * columns + (sign * along).clamp_min(0) + prefix).flatten()
        for sign in (1, -1)
    )
    table = bias[:, :, query, key].unflatten(-1, (2 * rows - 1, 2 * columns - 1))
    positions = (positions if positions.dim() == 3 else positions[None])[:, prefix:]
    reach = positions.new_tensor([max(rows - 1, 1), max(columns - 1, 1)])
    offsets = (positions[:, :, None] - positions[:, None]) / reach  # from -1 to 1
    table = table.to(offsets.dtype).expand(offsets.shape[0], -1, -1, -1)
    # grid_sample reads columns before rows.
    between = F.grid_sample(table, offsets.flip(-1), padding_mode="border", align_corners=True).to(bias.dtype)
    if prefix:  # all patches have the same bias with a token of the prefix
        side, batch = between.shape[-1], between.shape[0]
        above = bias[:, :, :prefix, prefix : prefix + 1].expand(batch, -1, -1, side)
        left = bias[:, :, prefix : prefix + 1, :prefix].expand(batch, -1, side, -1)
        first = bias[:, :, :prefix, :prefix].expand(batch, -1, -1, -1)
        between = torch.cat((torch.cat((first, above), 3), torch.cat((left, between), 3)), 2)
    return between


def token_of_patch_after(token_of_patch: Tensor, matched: Match, prefix: int) -> Tensor:
    """Return the updated ``token_of_patch`` [B, all tokens] after a merge."""
    # New order behind the prefix: kept tokens of A, then B.
    kept = matched.kept.shape[1]
    device = token_of_patch.device
    new_of_b = torch.arange(kept, kept + _set_b(matched.weights, prefix).shape[1], device=device)
    new_of_kept = torch.arange(kept, device=device).expand_as(matched.kept)
    new_of_a = torch.cat((matched.receivers + kept, new_of_kept), 1)  # in the order of the match
    order = torch.cat((matched.merged, matched.kept), 1)
    # The indices that sort a permutation are its inverse; topk sorts.
    inverse = order.topk(order.shape[1], dim=-1, largest=False).indices
    # Exporters take len(), unlike shape[0], for a constant.
    new = torch.cat((new_of_b.expand(order.shape[0], -1), new_of_a.gather(1, inverse)), 1)  # B, then A
    old = token_of_patch - prefix
    # Odd indices are in A, whose entries of `new` follow those of B.
    place = old // 2 + old % 2 * new_of_b.shape[0]
    return torch.where(old < 0, token_of_patch, new.gather(1, place.clamp_min(0)) + prefix)


def checkerboard_order(indices: Tensor, prefix: int) -> Tensor:
    """Reorder ``indices`` = 0..N-1 so that sets A and B form a checkerboard on a square image.

    All 4 neighbours of a patch are then in the other set. In raster order only 2 neighbours are.
    """
    # Neighbours swap in every second row, so the order is its own inverse. Rows of odd length alternate
    # already. The width of other images is unknown: their order stays.
    patch = indices[prefix:] - prefix
    count = patch[-1:] + 1  # a tensor: torch.export takes the root of a number for a constant
    side = count.sqrt().round().to(count.dtype)
    swaps = patch // side % 2 * (1 - side % 2) * (side**2 == count)
    return torch.cat((indices[:prefix], indices[prefix:] + swaps * (1 - patch % 2 * 2)))


def _set_b(x: Tensor, prefix: int) -> Tensor:
    # torch.export does not know that N // 2 + (N + 1) // 2 = N. Without it, sizes grow with each block.
    behind = x.shape[1] - prefix
    return x[:, prefix::2].expand(-1, behind - behind // 2, -1)


def _take_rows(tokens: Tensor, indices: Tensor, first: int = 0, step: int = 1) -> Tensor:
    """Return rows ``first + step * indices`` [B, n] of ``tokens`` [B, N, C], as [B, n, C]."""
    batch, total = tokens.shape[:2]
    # torch.export knows the length of this range; of a range in steps of `total` it does not.
    starts = torch.arange(batch, device=tokens.device)[:, None] * total + first
    # An embedding copies whole rows; gather copies single numbers and is slower.
    return F.embedding(torch.add(starts, indices, alpha=step), tokens.flatten(0, 1))


def at_least_float32(x: Tensor) -> Tensor:
    # float16 overflows in weighted sums, bfloat16 rounds sizes.
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def full_precision(x: Tensor) -> Any:
    # Rounded cosines would often be equal, and averages would lose precision.
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
