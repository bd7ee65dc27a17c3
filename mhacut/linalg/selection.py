"""Rankings of channels: greedy removal by the error that is left after those that stay are refitted.

Ours. For v and hidden channels this is the optimal brain surgeon (Hassibi & Stork 1993) on groups: removing
channel p and refitting the columns W on the rest costs ||w_p||^2 / [G^-1]_pp, with G the second moment of the
channels. For qk it is the same idea on logits, with q and k taken as independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mhacut.linalg.reconstruction import weighed_by

TINY = torch.finfo(torch.float64).tiny
RIDGE = 1e-6
"""Added to the variances before they are inverted, relative to their mean: channels may be linearly
dependent."""
AT_ONCE = 0.02
"""Fraction of the remaining channels that go in one step (one by one below 100). Removal one by one is much
slower and leaves hardly less error (docs/explanation/choices.md)."""

DENSE_ENOUGH = 0.9
"""Share of rows still in use below which matrices are packed again."""


@dataclass(frozen=True)
class Ranking:
    """Order of every head's channels, from the last to be removed to the first."""

    order: Tensor
    """Indices, [heads, d]."""

    def kept(self, width: int) -> Tensor:
        """Return the first ``width`` of every head, ascending, [heads, width]."""
        return self.order[:, :width].sort(dim=-1).values


@dataclass(frozen=True)
class Removal(Ranking):
    """A ranking with the error at every number of channels."""

    error: Tensor
    """Error left when so many channels stay, over all heads, [heads * d + 1]; falls to 0."""


def rank_channels(
    second: Tensor, columns: Tensor, heads: int, smallest: int, fisher: Tensor | None = None
) -> Removal:
    """Rank the channels of a layer that is read through ``columns``.

    Args:
        second: (centred) second moment of all channels, [heads * d, heads * d], float64.
        columns: weights that read them, [out, heads * d]; [places * out, heads * d] where they are read at
            several places, those of a place together.
        heads: number of heads, which all keep the same number of channels.
        smallest: channels per head that are never removed; they end up in ascending order at the front.
        fisher: Fisher information of the output, [out, out], by which :attr:`Removal.error` is weighed. The
            choice is by plain squared error: few images make the Fisher information noisy.
    """
    size = second.shape[0]
    width = size // heads
    inverse = damped_inverse(second)
    weights = columns.to(inverse, copy=True)
    place = torch.arange(size, device=second.device)  # channels of the rows and columns
    stays = torch.ones_like(place, dtype=torch.bool)  # those of them that are not removed
    closed = torch.zeros_like(stays)  # those that may not go: they have, or no more of their head may
    excess, remaining = [width - smallest] * heads, size
    owner = (place // width).tolist()
    none = weights.new_empty(len(weights), 0)
    steps = [_Removed(place[:0], none, none)]
    while any(excess):
        price = (weights.square().sum(0) / inverse.diagonal()).nan_to_num()  # below that of the closed ones
        price = price.masked_fill(closed, float("inf"))
        gone = _cheapest(price, owner, excess, max(1, int(AT_ONCE * remaining)))
        row, lost = inverse[gone], weights[:, gone]
        solved = _solve(row[:, gone], torch.cat([row, lost.mT], dim=1))
        share = solved[:, : len(place)]
        # A view would keep all of what was solved, as wide as the layer, until the last step.
        steps.append(_Removed(place[gone], lost, solved[:, len(place) :].mT.clone()))
        weights.addmm_(lost, share, alpha=-1)
        inverse.addmm_(row.mT, share, alpha=-1)  # leaves 0 in the rows and columns of those that go
        remaining -= len(gone)
        stays[gone], closed[gone] = False, True
        for head in {owner[channel] for channel in gone.tolist()}:
            if excess[head] == 0:
                closed |= place // width == head
        if remaining < DENSE_ENOUGH * len(place):  # copies take longer than sums
            inverse, weights = inverse[stays][:, stays], weights[:, stays]
            place, closed, stays = place[stays], closed[stays], stays[stays]
            owner = (place // width).tolist()
    removed = torch.cat([step.channels for step in steps])
    error = second.new_zeros(size + 1)
    error[remaining:size] = _spent(steps, fisher).cumsum(0).flip(0)
    error[:remaining] = error[remaining].clone()  # not known below
    sequence = torch.cat([removed, place[stays].flip(0)]).flip(0)
    owners = sequence // width
    order = torch.stack([sequence[owners == number] - number * width for number in range(heads)])
    return Removal(order, error)


@dataclass(frozen=True)
class _Removed:
    """Channels that were removed at once."""

    channels: Tensor
    """Their indices, [k]."""
    lost: Tensor
    """Columns that read them, W_P, refitted on what was left before, [out, k]."""
    priced: Tensor
    """W_P [G^-1]_PP^-1, [out, k]: its product with W_P^T is the error that the outputs get."""


def _spent(steps: Sequence[_Removed], fisher: Tensor | None) -> Tensor:
    """Return the error that each channel adds, in order of removal; those of a step share theirs equally."""
    lost, priced = (
        torch.cat(parts, 1) for parts in zip(*((step.lost, step.priced) for step in steps), strict=True)
    )
    each = (weighed_by(fisher, lost) * priced).sum(0)
    sizes = torch.tensor([len(step.channels) for step in steps], device=each.device)
    # index_add sums in no fixed order on GPUs.
    return torch.segment_reduce(each, "mean", lengths=sizes).repeat_interleave(sizes)


def _solve(system: Tensor, target: Tensor) -> Tensor:
    """Return system^-1 target; most systems are of one channel."""
    solution: Tensor = target / system if len(system) == 1 else torch.linalg.solve(system, target)
    return solution


def rank_logit_channels(query: Tensor, key: Tensor, smallest: int) -> Ranking:
    """Rank qk channels, in each head separately.

    With both sides predicted from the kept ones, q k^T keeps tr(P_q P_k) of its energy, where
    P = G_:S G_SS^-1 G_S:. Removing a channel takes a rank-1 term u u^T from each P, so that every step costs
    O(d^2).

    Args:
        query: second moment of q, [H, d, d], float64.
        key: second moment of k, centred over the keys of each image, [H, d, d].
        smallest: channels per head that are never removed; they end up in ascending order at the front.
    """
    heads, size = query.shape[:2]
    sides = _Side(query), _Side(key)
    crossed = [sides[1].energy @ sides[0].reach, sides[0].energy @ sides[1].reach]  # P_k A_q and P_q A_k
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
        steps = [side.without(gone, alive) for side in sides]
        for number, (step, other) in enumerate((steps, steps[::-1])):
            lost = other.column @ (other.column.mT @ sides[number].reach) / other.pivot
            at = crossed[number].gather(-1, gone.unsqueeze(-2).expand(-1, size, 1))
            less = at - other.column @ (other.column.mT @ step.column) / other.pivot
            crossed[number] = crossed[number] - lost - less @ step.row / step.pivot
        for side, step in zip(sides, steps, strict=True):
            side.take(step)
    stayed = alive.nonzero()[:, 1].view(heads, smallest)
    return Ranking(torch.cat([stayed, *reversed(removed)], dim=-1))


@dataclass(frozen=True)
class _Step:
    """Removal of one channel per head from a :class:`_Side`."""

    column: Tensor
    """Its column of A, [H, d, 1]."""
    row: Tensor
    """Its row of the inverse, [H, 1, d]."""
    pivot: Tensor
    """Its diagonal element of the inverse, [H, 1, 1]."""
    alive: Tensor
    """Whether each channel stays, [H, d]."""


class _Side:
    """q or k, all channels predicted from the channels S that are left."""

    def __init__(self, second: Tensor) -> None:
        self.inverse = damped_inverse(second)
        """G_SS^-1, zero elsewhere, [H, d, d]."""
        self.reach = second @ self.inverse
        """A = G_:S G_SS^-1."""
        self.energy = self.reach @ second
        """P = A G_S:."""

    def without(self, gone: Tensor, alive: Tensor) -> _Step:
        """Return the step that removes ``gone``, [H, 1]."""
        places = gone.unsqueeze(-2).expand(-1, self.inverse.shape[-2], 1)
        row = self.inverse.gather(-1, places).mT
        pivot = row.gather(-1, gone.unsqueeze(-2)).clamp_min(TINY)
        return _Step(self.reach.gather(-1, places), row, pivot, alive.clone())

    def take(self, step: _Step) -> None:
        self.energy = self.energy - step.column @ step.column.mT / step.pivot
        self.reach = (self.reach - step.column @ step.row / step.pivot) * step.alive.unsqueeze(-2)
        left = self.inverse - step.row.mT @ step.row / step.pivot
        self.inverse = left * step.alive.unsqueeze(-1) * step.alive.unsqueeze(-2)


def rank_parts(second: Tensor) -> Ranking:
    """Rank channels that no others can replace, in each head separately.

    Removing a set of them costs the squared length of the sum of their parts in the output; the next to go is
    the one that adds least to it.

    Args:
        second: second moment of the channels' parts in the output, [H, d, d], float64.
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
    """Rank channels as :func:`rank_channels` does, for heads that all keep the same positions.

    Args:
        second: (centred) second moment of all channels, [heads * d, heads * d], float64.
        columns: weights that read them, [out, heads * d].
        heads: number of heads.
        smallest: positions that are never removed; they end up in ascending order at the front.
    """
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
    """Return up to ``count`` channels of least price, of equals the first, and take them off ``excess``."""
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
    """Return ``second`` [..., d, d] with a ridge on its diagonal; it is positive definite.

    The ridge is :data:`RIDGE` of the mean variance. What rounding leaves of activations that are constant, or
    of fewer rows than channels, may have negative eigenvalues. Then the ridge is powers of ten larger, until
    it is at least twice as large as they are.
    """

    def with_ridge(ridge: Tensor) -> Tensor:
        lifted = second.clone()
        lifted.diagonal(dim1=-2, dim2=-1).add_(ridge)
        return lifted

    ridge = RIDGE * second.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(1e-30)
    enough = 20 * second.abs().sum(-1).max()  # not for ever, should there be a NaN
    while ridge.max() < enough:
        indefinite = torch.linalg.cholesky_ex(with_ridge(ridge / 2)).info > 0
        if not indefinite.any():
            break
        ridge = torch.where(indefinite[..., None], 10 * ridge, ridge)
    return with_ridge(ridge)


def damped_inverse(second: Tensor) -> Tensor:
    """Return the inverse of :func:`damped`."""
    inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(damped(second)))
    return inverse
