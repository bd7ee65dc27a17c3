"""Rankings of channels by greedy removal with a refit of the remaining channels.

For v and hidden channels, the ranking is the optimal brain surgeon (Hassibi & Stork 1993) on groups. Removal
of channel p with a refit of the columns W on the rest costs ||w_p||^2 / [G^-1]_pp, where G is the second
moment of the channels. For qk, the same method applies to the logits, with q and k assumed independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mhacut.linalg.reconstruction import weighed_by

TINY = torch.finfo(torch.float64).tiny
RIDGE = 1e-6
"""Ridge added to the variances before inversion, relative to their mean, because channels may be linearly
dependent."""
AT_ONCE = 0.02
"""Fraction of the remaining channels that a ranking step removes. Below 100 channels, a step removes 1."""

DENSE_ENOUGH = 0.9
"""Removed rows are deleted from the matrices when less than this fraction of the rows remains."""


class Ranking(NamedTuple):
    order: Tensor
    """Channel indices, most important first, [heads, d]."""
    error: Tensor | None = None
    """Output error by number of kept channels over all heads, [heads * d + 1], descending to 0. None if
    unknown."""

    def kept(self, width: int) -> Tensor:
        """Return the indices of the most important channels of each head, ascending, [heads, width]."""
        return self.order[:, :width].sort(dim=-1).values


def rank_channels(
    second: Tensor, columns: Tensor, heads: int, smallest: int, fisher: Tensor | None = None
) -> Ranking:
    """Rank channels by importance for the output columns that read them.

    ``second`` is [heads * d, heads * d], ``columns`` [outputs, heads * d]. The first ``smallest`` channels
    per head are never removed. ``fisher`` [out, out] weighs :attr:`Ranking.error`, not the order, because
    Fisher information from few images is noisy.
    """
    size = second.shape[0]
    width = size // heads
    inverse = damped_inverse(second)
    weights = columns.to(inverse, copy=True)
    place = torch.arange(size, device=second.device)  # channels of the rows and columns
    stays = torch.ones_like(place, dtype=torch.bool)  # channels that are not removed yet
    closed = torch.zeros_like(stays)  # removed channels, and all channels of heads at their smallest width
    excess, remaining = [width - smallest] * heads, size
    owner = (place // width).tolist()
    # For each step: the removed channels P, the columns W_P that read them, and W_P [G^-1]_PP^-1. W_P was
    # refitted in earlier steps.
    none = weights.new_empty(len(weights), 0)
    removed, lost_columns, solved_columns = [place[:0]], [none], [none]
    while any(excess):
        price = (
            weights.square().sum(0) / inverse.diagonal()
        ).nan_to_num()  # finite, so below closed channels
        price = price.masked_fill(closed, float("inf"))
        gone = _cheapest(price, owner, excess, max(1, int(AT_ONCE * remaining)))
        row, lost = inverse[gone], weights[:, gone]
        solved = _solve(row[:, gone], torch.cat([row, lost.mT], dim=1))
        share = solved[:, : len(place)]
        removed.append(place[gone])
        lost_columns.append(lost)
        # A view would keep the whole of `solved`, which is as wide as the layer, until the last step.
        solved_columns.append(solved[:, len(place) :].mT.clone())
        weights.addmm_(lost, share, alpha=-1)
        inverse.addmm_(row.mT, share, alpha=-1)  # leaves 0 in the rows and columns of removed channels
        remaining -= len(gone)
        stays[gone], closed[gone] = False, True
        for head in {owner[channel] for channel in gone.tolist()}:
            if excess[head] == 0:
                closed |= place // width == head
        if remaining < DENSE_ENOUGH * len(place):  # copies take longer than sums
            inverse, weights = inverse[stays][:, stays], weights[:, stays]
            place, closed, stays = place[stays], closed[stays], stays[stays]
            owner = (place // width).tolist()
    error = second.new_zeros(size + 1)
    error[remaining:size] = _added_errors(lost_columns, solved_columns, fisher).cumsum(0).flip(0)
    error[:remaining] = error[remaining].clone()  # unknown below the smallest width
    sequence = torch.cat([*removed, place[stays].flip(0)]).flip(0)
    owners = sequence // width
    order = torch.stack([sequence[owners == number] - number * width for number in range(heads)])
    return Ranking(order, error)


def _added_errors(lost: list[Tensor], solved: list[Tensor], fisher: Tensor | None) -> Tensor:
    """Return the error that each removed channel adds. Channels removed in 1 step share its error equally."""
    # A step adds the output error W_P [G^-1]_PP^-1 W_P^T.
    errors = (weighed_by(fisher, torch.cat(lost, 1)) * torch.cat(solved, 1)).sum(0)
    sizes = torch.tensor([columns.shape[1] for columns in lost], device=errors.device)
    # index_add sums in no fixed order on GPUs.
    return torch.segment_reduce(errors, "mean", lengths=sizes).repeat_interleave(sizes)


def _solve(system: Tensor, target: Tensor) -> Tensor:
    solution: Tensor = target / system if len(system) == 1 else torch.linalg.solve(system, target)
    return solution


def rank_logit_channels(query: Tensor, key: Tensor, smallest: int) -> Ranking:
    """Rank q/k channels of each head, given second moments [H, d, d] of q and of centred k."""
    heads, size = query.shape[:2]
    sides = _Side(query), _Side(key)
    crossed = [sides[1].energy @ sides[0].reach, sides[0].energy @ sides[1].reach]  # P_k A_q and P_q A_k
    # Predictions from the kept channels leave tr(P_q P_k) of the energy of q k^T, with P = G_:S G_SS^-1 G_S:.
    # A removed channel takes a rank-1 term from each P, so that a step costs O(d^2).
    alive = torch.ones(heads, size, dtype=torch.bool, device=query.device)
    removed: list[Tensor] = []
    for _ in range(size - smallest):
        roots = [side.inverse.diagonal(dim1=-2, dim2=-1).clamp_min(TINY).sqrt() for side in sides]
        price = -((sides[0].reach * sides[1].reach).sum(-2) / (roots[0] * roots[1])).square()
        for side, mixed, root in zip(sides, crossed, roots, strict=True):
            price = price + (side.reach * mixed).sum(-2) / root.square()
        gone = price.masked_fill(~alive, float("inf")).argmin(-1, keepdim=True)
        alive.scatter_(-1, gone, False)
        removed.append(gone)
        terms = [side.terms_of(gone) for side in sides]
        for number, ((column, row, pivot), (other, _, other_pivot)) in enumerate((terms, terms[::-1])):
            lost = other @ (other.mT @ sides[number].reach) / other_pivot
            at = crossed[number].gather(-1, gone.unsqueeze(-2).expand(-1, size, 1))
            less = at - other @ (other.mT @ column) / other_pivot
            crossed[number] = crossed[number] - lost - less @ row / pivot
        for side, (column, row, pivot) in zip(sides, terms, strict=True):
            side.remove(column, row, pivot, alive)
    stayed = alive.nonzero()[:, 1].view(heads, smallest)
    return Ranking(torch.cat([stayed, *reversed(removed)], dim=-1))


class _Side:
    """State of q or k while logit channels are ranked: predictions of all channels from the kept ones."""

    def __init__(self, second: Tensor) -> None:
        self.inverse = damped_inverse(second)
        """G_SS^-1, zero elsewhere, [H, d, d]."""
        self.reach = second @ self.inverse
        """A = G_:S G_SS^-1."""
        self.energy = self.reach @ second
        """P = A G_S:."""

    def terms_of(self, gone: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        places = gone.unsqueeze(-2).expand(-1, self.inverse.shape[-2], 1)
        row = self.inverse.gather(-1, places).mT
        pivot = row.gather(-1, gone.unsqueeze(-2)).clamp_min(TINY)
        return self.reach.gather(-1, places), row, pivot

    def remove(self, column: Tensor, row: Tensor, pivot: Tensor, alive: Tensor) -> None:
        self.energy = self.energy - column @ column.mT / pivot
        self.reach = (self.reach - column @ row / pivot) * alive.unsqueeze(-2)
        self.inverse = (self.inverse - row.mT @ row / pivot) * alive.unsqueeze(-1) * alive.unsqueeze(-2)


def rank_parts(second: Tensor) -> Ranking:
    """Rank channels of each head that cannot replace each other.

    The channel whose removal adds least to the squared length of the sum of removed contributions is removed
    next.
    """
    size = second.shape[-1]
    price = second.diagonal(dim1=-2, dim2=-1).clone()
    removed: list[Tensor] = []
    for _ in range(size):
        gone = price.argmin(-1, keepdim=True)  # (H, 1)
        price = price + 2 * second.gather(-2, gone.unsqueeze(-1).expand(-1, 1, size)).squeeze(-2)
        price.scatter_(-1, gone, float("inf"))
        removed.append(gone)
    return Ranking(torch.cat(removed[::-1], dim=-1))


def rank_shared_channels(second: Tensor, columns: Tensor, heads: int, smallest: int) -> Ranking:
    """Rank channels as :func:`rank_channels` does, for heads that keep the same channel indices."""
    width = second.shape[0] // heads
    inverse = damped_inverse(second)
    weights = columns.to(inverse)
    alive = torch.ones(width, dtype=torch.bool, device=second.device)
    positions = torch.arange(heads, device=second.device)[:, None] * width + torch.arange(
        width, device=second.device
    )  # (H, d)
    removed: list[Tensor] = []
    for _ in range(width - smallest):
        left = alive.nonzero()[:, 0]
        group = positions[:, left].T  # (left, H)
        blocks = inverse[group[:, :, None], group[:, None, :]]  # (left, H, H)
        lost = weights[:, group]  # (out, left, H)
        gram = torch.einsum("olh,olk->lhk", lost, lost)
        price = torch.linalg.solve(blocks, gram).diagonal(dim1=-2, dim2=-1).sum(-1)
        gone = left[price.argmin()]
        rows = positions[:, gone]
        share = torch.linalg.solve(inverse[rows][:, rows], inverse[rows])
        weights = weights - weights[:, rows] @ share
        inverse = inverse - inverse[:, rows] @ share
        alive[gone] = False
        removed.append(gone[None])
    order = torch.cat([alive.nonzero()[:, 0], *removed[::-1]])
    return Ranking(order.expand(heads, -1))


def _cheapest(price: Tensor, owner: Sequence[int], excess: list[int], count: int) -> Tensor:
    if count == 1:
        chosen = [int(price.argmin())]
        excess[owner[chosen[0]]] -= 1
    else:
        chosen = []
        for channel in price.sort(stable=True).indices.tolist():
            if excess[owner[channel]] > 0:
                excess[owner[channel]] -= 1
                chosen.append(channel)
                if len(chosen) == count:
                    break
    return torch.tensor(chosen, device=price.device)


def damped(second: Tensor) -> Tensor:
    def with_ridge(ridge: Tensor) -> Tensor:
        lifted = second.clone()
        lifted.diagonal(dim1=-2, dim2=-1).add_(ridge)
        return lifted

    ridge = RIDGE * second.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(1e-30)
    # Constant activations, or fewer rows than channels, leave negative eigenvalues by rounding. The ridge
    # grows by powers of 10 until it is at least twice as large.
    enough = 20 * second.abs().sum(-1).max()  # a bound, so that a NaN does not loop for ever
    while ridge.max() < enough:
        indefinite = torch.linalg.cholesky_ex(with_ridge(ridge / 2)).info > 0
        if not indefinite.any():
            break
        ridge = torch.where(indefinite[..., None], 10 * ridge, ridge)
    return with_ridge(ridge)


def damped_inverse(second: Tensor) -> Tensor:
    inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(damped(second)))
    return inverse
