"""Whitening of features, so that squared errors are divergences in nats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mhacut.linalg.moments import Moments

SHRINKAGE = 0.5
"""Share of the diagonal in the shrunk covariance."""
FLOOR = 1e-6
"""Least variance of a channel, relative to the mean of all."""


@dataclass(frozen=True)
class Whitening:
    """Map of features f to z = W^T (f - m), for which 1/2 |z - z'|^2 is a divergence in nats.

    If the dense model's features are the mean of a normal distribution of covariance S, and the pruned
    model's that of another, KL(N(f, S) || N(f', S)) = 1/2 (f - f')^T S^-1 (f - f'), half the squared
    Mahalanobis distance (Kullback 1959, chapter 9). S is the covariance of the dense features over tokens and
    images, shrunk towards its diagonal (target D of Schaefer & Strimmer 2005): the inverse of an estimate
    exaggerates errors in the directions that vary least, which few images estimate badly.
    """

    mean: Tensor
    """m, [C]."""
    matrix: Tensor
    """W, [C, C], with W W^T = S^-1: the inverse transposed Cholesky factor of S."""

    @classmethod
    def of(cls, moments: Moments) -> Whitening:
        """Return the whitening of features with these moments, in float32.

        Args:
            moments: of the features of all tokens, [C].
        """
        covariance = moments.covariance
        variance = covariance.diagonal()
        # Where nothing varies, what is left is rounding, in proportion to the features' energy.
        usual = torch.maximum(variance.mean(), 1e-6 * moments.energy.diagonal().mean())
        floor = (FLOOR * usual).clamp_min(torch.finfo(torch.float32).tiny)
        shrunk = (1 - SHRINKAGE) * covariance
        shrunk.diagonal().copy_(variance.clamp_min(floor))
        factor = torch.linalg.cholesky(shrunk)
        eye = torch.eye(len(variance), dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
        return cls(moments.mean.float(), inverse.mT.float())

    def __call__(self, features: Tensor) -> Tensor:
        """Whiten ``features`` [..., C], in their precision."""
        return (features - self.mean.to(features)) @ self.matrix.to(features)
