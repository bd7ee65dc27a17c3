"""First and second moments of activations, and of channel contributions in linear attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-6
"""Constant that linear attention adds to its denominator."""
_AT_ONCE = 192
"""Number of columns per block in :func:`gram`."""
_ROWS = 256
"""Number of rows that are converted to float64 at the same time."""
_SMALL, _LARGE = 1e-15, 1e15
"""Smallest and largest activation whose square, summed 1e8 times, fits float32."""


@dataclass
class Moments:
    """Sums of x and of x x^T over activation rows x, batched over leading dimensions."""

    rows: int
    total: Tensor
    """Sum of x, [..., d], float64."""
    second: Tensor
    """Sum of x x^T, [..., d, d], float64."""

    @classmethod
    def of(cls, activation: Tensor, weights: Tensor | None = None) -> Moments:
        """Return the moments of ``activation`` [..., rows, d]; row weights have mean 1 over all data."""
        # Products are taken in float32 about the mean of the rows: about 0, the rounding of a large mean
        # would drown a small variance. Values that overflow or vanish in float32 use float64.
        x = activation.detach().float()
        if x.numel() and not _SMALL < max(-float(x.min()), float(x.max())) < _LARGE:
            x = x.double()
        rows = x.shape[-2]
        weight: float | Tensor = rows
        parts = x.split(_ROWS, -2)  # in float64, all of x would fit no cache
        if weights is None:
            total, centre = torch.stack([part.double().sum(-2) for part in parts]).sum(0), x.mean(-2)
            x = x - centre.unsqueeze(-2)
        else:
            shares = weights.double().split(_ROWS)
            sums = [share @ part.double() for share, part in zip(shares, parts, strict=True)]
            total, weight = torch.stack(sums).sum(0), weights.double().sum()
            centre = (total / weight).to(x)
            x = (x - centre.unsqueeze(-2)).mul_(weights.to(x).sqrt().unsqueeze(-1))
        middle = centre.double()
        rest = total - weight * middle  # 0 but for rounding
        # sum of (x + m)(x + m)^T = sum of x x^T + m total^T + rest m^T
        second = torch.stack([middle, rest], -1) @ torch.stack([total, middle], -2)
        return cls(rows, total, second.add_(gram(x)))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.rows + other.rows, self.total + other.total, self.second + other.second)

    def __iadd__(self, other: Moments) -> Moments:
        self.rows += other.rows
        self.total += other.total
        self.second += other.second
        return self

    def transformed(self, matrix: Tensor) -> Moments:
        total = (matrix @ self.total.unsqueeze(-1)).squeeze(-1)
        return Moments(self.rows, total, matrix @ self.second @ matrix.mT)

    @property
    def mean(self) -> Tensor:
        return self.total / self.rows

    def about(self, centre: Tensor) -> Tensor:
        """Return the mean of (x - centre)(x - centre)^T over rows, [..., d, d]."""
        mean = self.mean
        # - m c^T - c m^T + c c^T, in one pass
        shift = torch.stack([-mean, centre], -1) @ torch.stack([centre, centre - mean], -2)
        return shift.add_(self.second, alpha=1 / self.rows)

    @property
    def covariance(self) -> Tensor:
        return self.about(self.mean)

    @property
    def energy(self) -> Tensor:
        """Mean of x x^T over rows, [..., d, d]."""
        return self.second / self.rows


def gram(x: Tensor) -> Tensor:
    """Return x^T x [..., d, d] for rows [..., rows, d]. Only the upper block triangle is computed."""
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


def linear_attention_energy(query: Tensor, key: Tensor) -> Tensor:
    """Return ||A - A without channel i||_F^2 of linear attention A, summed over images, [H, d].

    A_nj = q_n . k_j / (sum_j q_n . k_j + N * 1e-6), with non-negative features q [B, H, N, d] and k [B, H, M,
    d]. The norms of the other features stay as with channel i.
    """
    query, key = query.double(), key.double()
    weights, mean = _weights(query, key)
    gram = key.mT @ key / key.shape[-2] ** 2
    along, square = _along_output(weights, gram)
    mean = mean.unsqueeze(-2)
    # A - A without i = w (k_i - m A) / (1 - w m) in the row of a token, with w its query over the sum of
    # weights and m the mean key of the channel: the square of the bracket, summed over keys.
    first = gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) - 2 * along * mean + square * mean.square()
    left = 1 - weights * mean  # of the denominator, (B, H, N, d)
    lost = (weights / left.clamp_min(EPSILON)).square() * first.clamp_min(0)
    # Without its only channel, nothing is left of a token that the epsilon would not drown.
    return torch.where(left < EPSILON, square, lost).sum(-2).sum(0)


def linear_contributions(query: Tensor, key: Tensor, value: Tensor, output_gram: Tensor) -> Tensor:
    """Return second moments of the channels' contributions to the output of linear attention, [H, d, d].

    Summed over S x S, they approximate the squared output error after removal of the channels S. Without
    channel i, output n moves by -q_ni (kv_i - out_n km_i) / (sum of its weights) to first order, with kv the
    mean of k v^T and km the mean of k. ``output_gram`` is W^T W of the weights W that read each head's
    output.
    """
    query, key, value = query.double(), key.double(), value.double()
    weights, mean = _weights(query, key)
    keys_values = key.mT @ value / key.shape[-2]  # (B, H, d, d_v)
    gram = keys_values @ output_gram.to(query) @ keys_values.mT
    along, square = _along_output(weights, gram)
    # Products of w_i (kv_i - out km_i) with w_j (kv_j - out km_j), summed over tokens, term by term.
    cross = ((weights * along).mT @ weights) * mean.unsqueeze(-2)
    parts = (weights.mT @ weights) * gram
    outer = ((weights * square).mT @ weights) * mean.unsqueeze(-1) * mean.unsqueeze(-2)
    return (parts - cross - cross.mT + outer).sum(0)


def _weights(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries divided by the sum of their weights, [B, H, N, d], and the mean key [B, H, d]."""
    mean = key.mean(-2)
    return query / (query @ mean.unsqueeze(-1) + EPSILON), mean


def _along_output(weights: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inner products of the attention output with each channel and with the output."""
    along = weights @ gram
    return along, (along * weights).sum(-1, keepdim=True)
