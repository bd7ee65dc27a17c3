"""First and second moments of activations, summed over any number of rows in float64."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Moments:
    """Sums over rows x of x and of x x^T; batched over leading dimensions."""

    rows: int
    total: Tensor
    """[..., d], float64."""
    second: Tensor
    """[..., d, d], float64."""

    @classmethod
    def of(cls, activation: Tensor) -> Moments:
        """Of ``activation`` [..., rows, d]; products in float32, which a single batch cannot wear out."""
        x = activation.detach().float()
        return cls(x.shape[-2], x.double().sum(-2), (x.transpose(-2, -1) @ x).double())

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.rows + other.rows, self.total + other.total, self.second + other.second)

    def transformed(self, matrix: Tensor) -> Moments:
        """Of ``matrix`` x in place of x; [..., d, d]."""
        total = (matrix @ self.total.unsqueeze(-1)).squeeze(-1)
        return Moments(self.rows, total, matrix @ self.second @ matrix.mT)

    @property
    def mean(self) -> Tensor:
        """[..., d]."""
        return self.total / self.rows

    def about(self, centre: Tensor) -> Tensor:
        """Mean of (x - centre)(x - centre)^T, [..., d, d]."""
        cross = self.mean.unsqueeze(-1) * centre.unsqueeze(-2)
        square = centre.unsqueeze(-1) * centre.unsqueeze(-2)
        return self.second / self.rows - cross - cross.transpose(-2, -1) + square

    @property
    def covariance(self) -> Tensor:
        return self.about(self.mean)

    @property
    def energy(self) -> Tensor:
        """Mean of x x^T, not centred."""
        return self.second / self.rows
