"""First and second moments of activations, summed over any number of weighted rows in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_AT_ONCE = 192
"""Columns of a block of :func:`gram`."""
_SMALL, _LARGE = 1e-15, 1e15
"""Bounds of activations within which float32 can hold their squares and sums of 1e8 of these."""


@dataclass
class Moments:
    """Sums over rows x of x and of x x^T; batched over leading dimensions."""

    rows: int
    """Number of rows, which is also the sum of their weights."""
    total: Tensor
    """[..., d], float64."""
    second: Tensor
    """[..., d, d], float64."""

    @classmethod
    def of(cls, activation: Tensor, weights: Tensor | None = None) -> Moments:
        """Return the moments of ``activation`` [..., rows, d], each row counted ``weights`` [rows] times.

        Over everything that is added up, weights must have the mean 1.

        Products are taken in float32 about the mean of these rows: about 0, the rounding of a large mean
        would drown a small variance, and covariances could come out negative. They are taken in float64 where
        those of float32 would overflow, or all vanish.
        """
        x = activation.detach().float()
        if x.numel() and not _SMALL < max(-float(x.min()), float(x.max())) < _LARGE:
            x = x.double()
        rows = x.shape[-2]
        weight: float | Tensor = rows
        if weights is None:
            total, centre = x.double().sum(-2), x.mean(-2)
            x = x - centre.unsqueeze(-2)
        else:
            total, weight = weights.double() @ x.double(), weights.double().sum()
            centre = (total / weight).to(x)
            x = (x - centre.unsqueeze(-2)) * weights.to(x).sqrt().unsqueeze(-1)
        middle = centre.double()
        rest = total - weight * middle  # 0 but for rounding
        # sum of (x + m)(x + m)^T = sum of x x^T + m total^T + rest m^T
        second = torch.stack([middle, rest], -1) @ torch.stack([total, middle], -2)
        return cls(rows, total, second.add_(gram(x)))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.rows + other.rows, self.total + other.total, self.second + other.second)

    def __iadd__(self, other: Moments) -> Moments:
        """Add ``other`` in place, which for wide layers saves much copying."""
        self.rows += other.rows
        self.total += other.total
        self.second += other.second
        return self

    def transformed(self, matrix: Tensor) -> Moments:
        """Return the moments of ``matrix`` x; ``matrix`` is [..., d, d]."""
        total = (matrix @ self.total.unsqueeze(-1)).squeeze(-1)
        return Moments(self.rows, total, matrix @ self.second @ matrix.mT)

    @property
    def mean(self) -> Tensor:
        """[..., d]."""
        return self.total / self.rows

    def about(self, centre: Tensor) -> Tensor:
        """Mean of (x - centre)(x - centre)^T, [..., d, d]."""
        mean = self.mean
        # - m c^T - c m^T + c c^T, in one pass
        shift = torch.stack([-mean, centre], -1) @ torch.stack([centre, centre - mean], -2)
        return shift.add_(self.second, alpha=1 / self.rows)

    @property
    def covariance(self) -> Tensor:
        """Mean of (x - mean)(x - mean)^T, [..., d, d]."""
        return self.about(self.mean)

    @property
    def energy(self) -> Tensor:
        """Mean of x x^T, not centred, [..., d, d]."""
        return self.second / self.rows


def gram(x: Tensor) -> Tensor:
    """Return x^T x, [..., d, d], of rows [..., rows, d], in little more than half the time where d is large.

    Blocks below the diagonal are copies of those above.
    """
    size = x.shape[-1]
    if size < 2 * _AT_ONCE:
        return x.mT @ x
    product = x.new_empty(*x.shape[:-2], size, size)
    for start in range(0, size, _AT_ONCE):
        stop = start + _AT_ONCE
        block = x[..., start:stop].mT @ x[..., start:]
        product[..., start:stop, start:] = block
        product[..., stop:, start:stop] = block[..., _AT_ONCE:].mT
    return product
