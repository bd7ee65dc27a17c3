"""Token merging that leaves a smaller grid of tokens, for ViTs whose blocks attend within windows.

Every row of a window, then every column, loses the same number of tokens, each merged into a neighbour in its
line (as in CubistMerge, arXiv 2509.21764). Windows of ``window`` x ``window`` tokens thus become windows of
``side`` x ``side`` tokens, and global blocks attend to a smaller grid. Costs and averages are those of
:mod:`mhacut.surgery.token_merging`.

Two properties of timm's SAM stay as they are:

- SAM resizes its tables of relative positions to the side of a window or grid. A merged token thus has the
  position of its place in the smaller grid. Mean positions of patches lose little less, but take a bias of
  their own for every pair of tokens (docs/explanation/choices.md).
- Where the grid does not divide into windows, SAM pads the last windows with zeros, and their keys take part
  in the softmax. The last windows have fewer tokens after a merge too, and the padding of the smaller windows
  weighs as much as the padding that it replaces. Padding and tokens never merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer_sam import window_partition, window_unpartition
from torch import Tensor, nn

from mhacut.errors import PlanError
from mhacut.surgery.token_merging import Match, SizedTokens, _take_rows, match, merge

Grid = tuple[int, int]
"""Rows and columns of a grid of tokens."""


def length_left(length: int, window: int, side: int) -> int:
    """Return the tokens that a line of ``length`` tokens has if windows have ``side`` tokens per line."""
    full, rest = divmod(length, window)
    # An incomplete window keeps from 1 token at side 1 to `rest` tokens at side `window`. Always fewer than
    # `side`, so that padding is left, and at least half of the tokens before a step of `least_side`.
    return full * side + (1 + (rest - 1) * (side - 1) // (window - 1) if rest else 0)


def least_side(side: int) -> int:
    """Return the smallest side that 1 block can leave: at most half of the tokens of a line merge."""
    return side // 2 + 1


def steps_of(grid: Grid, window: int) -> tuple[tuple[int, int], ...]:
    """Return the possible numbers of tokens, descending, each with the least that 1 block leaves of them."""
    sides = _side_by_tokens(grid, window)
    return tuple(
        (count, min(left for left, less in sides.items() if less >= min(side, least_side(side))))
        for count, side in sides.items()
    )


def _side_by_tokens(grid: Grid, window: int) -> dict[int, int]:
    """Return {number of tokens: side of a window}, descending; of sides with equal tokens the smallest."""
    rows, columns = ([length_left(n, window, side) for side in range(window, 1, -1)] for n in grid)
    sides = {a * b: side for a, b, side in zip(rows, columns, range(window, 1, -1), strict=True)}
    return sides | {grid[0] * grid[1]: window}


def sides_of(merged: Sequence[int], grid: Grid, window: int) -> list[int]:
    """Return the side of windows before each block and behind the last, for numbers of merged tokens."""
    by_tokens, sides, left = _side_by_tokens(grid, window), [window], grid[0] * grid[1]
    for number, count in enumerate(merged):
        side = sides[-1]
        possible = {left - n: less for n, less in by_tokens.items() if least_side(side) <= less < side}
        if count and count not in possible:
            raise PlanError(
                f"token plan: block {number} has windows of {side} x {side} tokens and merges "
                f"{' or '.join(map(str, possible)) or 0}, so that a smaller grid is left; found {count}"
            )
        sides.append(possible[count] if count else side)
        left -= count
    return sides


class LineMatcher(nn.Module):
    """Module that chooses the neighbours to merge in lines. Hooks can read and replace the chosen pairs."""

    def forward(self, lines: list[tuple[Tensor, Tensor, int]]) -> list[Match]:
        """Match tokens [L, N, C] with sizes [L, N, 1] and numbers of merges."""
        return [match(x.detach(), sizes, count, 0, neighbours=True) for x, sizes, count in lines]


class GridMerger(nn.Module):
    """Module that merges the tokens of a grid, so that windows become smaller."""

    def __init__(self, count: int, window: int, before: int, after: int) -> None:
        super().__init__()
        self.count, self.window, self.before, self.after = count, window, before, after
        self.rows, self.columns = LineMatcher(), LineMatcher()

    def forward(self, tokens: SizedTokens) -> SizedTokens:
        """Merge tokens with ``x`` [B, rows, columns, C]."""
        assert tokens.token_of_patch is not None
        rows, columns = map(int, tokens.token_of_patch.shape[1:])
        tokens = self._merge_rows(tokens, columns, self.rows)
        return _transposed(self._merge_rows(_transposed(tokens), rows, self.columns))

    def _merge_rows(self, tokens: SizedTokens, length: int, matcher: LineMatcher) -> SizedTokens:
        """Merge tokens in every row; ``length`` is the number of patches in a row."""
        x, sizes, token_of_patch, *_ = tokens
        assert token_of_patch is not None
        rows, columns = map(int, x.shape[1:3])
        full, left = length // self.window, length_left(length, self.window, self.after)
        rest, rest_left = (n - full * side for n, side in ((columns, self.before), (left, self.after)))
        # Windows in a row, tokens of their lines before and after; for whole windows, and for the incomplete.
        kinds = [(full, self.before, self.after), (1, rest, rest_left)]
        kinds = [kind for kind in kinds if kind[0] * kind[1]]
        lines, start = [], 0
        for windows, before, _ in kinds:
            place = torch.arange(before, device=x.device).expand(x.shape[0] * rows * windows, -1)
            within = slice(start, start + windows * before)
            parts = [part[:, :, within].reshape(-1, before, part.shape[-1]) for part in (x, sizes)]
            lines.append(SizedTokens(parts[0], parts[1], place))
            start += windows * before
        counts = [before - after for _, before, after in kinds]
        merging = [(each.x, each.sizes, count) for each, count in zip(lines, counts, strict=True) if count]
        matches = iter(matcher(merging))
        found, start = [], 0
        for each, count, (windows, _, after) in zip(lines, counts, kinds, strict=True):
            merged = merge_neighbours(each, next(matches)) if count else each
            assert merged.token_of_patch is not None
            first = torch.arange(windows, device=x.device)[:, None] * after + start
            place = (merged.token_of_patch.unflatten(0, (-1, rows, windows)) + first).flatten(2)
            both = [
                part.reshape(-1, rows, windows * after, part.shape[-1]) for part in (merged.x, merged.sizes)
            ]
            found.append((*both, place))
            start += windows * after
        x, sizes, place = (torch.cat(part, 2) for part in zip(*found, strict=True))
        place = (place + torch.arange(rows, device=x.device)[:, None] * left).flatten(1)
        token_of_patch = place.gather(1, token_of_patch.flatten(1)).unflatten(1, token_of_patch.shape[1:])
        return tokens._replace(x=x, sizes=sizes, token_of_patch=token_of_patch)


def merge_neighbours(tokens: SizedTokens, matched: Match) -> SizedTokens:
    """Merge ``tokens``, lines [L, N, C] with a ``token_of_patch``, and keep the order of each line."""
    merged = merge(tokens, matched, 0)
    assert merged.token_of_patch is not None
    # Rest of A, then B: from their old places back into order. topk sorts, as in `match`.
    even = torch.arange(merged.x.shape[1] - matched.kept.shape[1], device=merged.x.device) * 2
    old = torch.cat((matched.kept * 2 + 1, even.expand(matched.kept.shape[0], -1)), 1)
    order = old.topk(old.shape[1], dim=-1, largest=False).indices
    new = order.topk(order.shape[1], dim=-1, largest=False).indices  # the inverse
    return merged._replace(
        x=_take_rows(merged.x, order),
        sizes=_take_rows(merged.sizes, order),
        token_of_patch=new.gather(1, merged.token_of_patch),
    )


def _transposed(tokens: SizedTokens) -> SizedTokens:
    x, sizes, index, *_ = tokens
    assert index is not None
    rows, columns = map(int, x.shape[1:3])
    index = index % columns * rows + index // columns
    return tokens._replace(x=x.transpose(1, 2), sizes=sizes.transpose(1, 2), token_of_patch=index)


class GridMerging:
    """Mixin for SAM's block that merges tokens between attention and MLP."""

    matcher: GridMerger | None
    """Module that merges tokens; None if the block merges no tokens."""
    window: int
    """Side of the windows of the dense model."""
    side: int
    """Side of windows before this block merges."""

    def forward(self: Any, x: Tensor | SizedTokens) -> Tensor | SizedTokens:
        """Compute the block for tokens [B, rows, columns, C]."""
        tokens = x if isinstance(x, SizedTokens) else _with_sizes(x)
        y = self.norm1(tokens.x)
        size = tuple(map(int, y.shape[1:3]))
        if self.window_size > 0:
            y, padded = window_partition(y, self.side)
        # Before the first merge, all sizes are 1.
        y = self.attn(y, None if self.side == self.window else self._bias(tokens, size))
        if self.window_size > 0:
            y = window_unpartition(y, self.side, size, padded)
        tokens = tokens._replace(x=tokens.x + self.drop_path1(self.ls1(y)))
        if self.matcher is not None:
            tokens = self.matcher(tokens)
        x = tokens.x.flatten(1, 2)
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        tokens = tokens._replace(x=x.unflatten(1, tuple(map(int, tokens.x.shape[1:3]))))
        return tokens if self.gives_sizes else tokens.unmerge()

    def _bias(self: Any, tokens: SizedTokens, size: Grid) -> Tensor:
        """Return the bias of token sizes on logits, [B or windows of all images, 1, 1, N]."""
        sizes = tokens.sizes
        if self.window_size > 0:
            padding = self._sizes_of_padding(tokens, size)
            rows, columns = len(padding) - size[0], len(padding[0]) - size[1]
            if rows or columns:
                sizes = F.pad(sizes, (0, 0, 0, columns, 0, rows)) + sizes.new_tensor(padding)[..., None]
            sizes, _ = window_partition(sizes, self.side)
        return sizes.flatten(1, 2).mT.log()[:, None]

    def _sizes_of_padding(self, tokens: SizedTokens, size: Grid) -> list[list[float]]:
        """Return the sizes of padded tokens in whole windows; 0 for the other tokens."""
        assert tokens.token_of_patch is not None
        extents = []
        for length, left in zip(map(int, tokens.token_of_patch.shape[1:]), size, strict=True):
            rest, kept = length % self.window, left % self.side
            extent = [self.window / self.side] * (left - kept)
            if rest:
                extent += [rest / kept] * kept
                extent += [(self.window - rest) / (self.side - kept)] * (self.side - kept)
            extents.append(extent)
        rows, columns = size
        return [
            [0.0 if i < rows and j < columns else down * along for j, along in enumerate(extents[1])]
            for i, down in enumerate(extents[0])
        ]


def _with_sizes(x: Tensor) -> SizedTokens:
    rows, columns = map(int, x.shape[1:3])
    token_of_patch = torch.arange(rows * columns, device=x.device).view(1, rows, columns)
    return SizedTokens(x, torch.ones_like(x[..., :1]), token_of_patch.expand(x.shape[0], -1, -1))
