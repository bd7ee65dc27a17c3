"""Spectrum of a head's contribution to the logits or the output, and its effective rank.

Ours. The energies are those of the channels of the PCA basis (:mod:`mhacut.linalg.pca`), which a cut loses
from the tail on: the rank at 99 % is the width that keeps 99 % before anything is refitted.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logit_energies(query: Tensor, key: Tensor) -> Tensor:
    """Return the energy of each PCA channel of the logits q k^T, falling, [H, d].

    The squared singular values of R_q R_k, with R the symmetric roots of the second moments, which are the
    eigenvalues of R_q K R_q.

    Args:
        query: second moment of q, [H, d, d], float64.
        key: second moment of k, centred over the keys of each image, [H, d, d].
    """
    return _between(query, key)


def output_energies(second: Tensor, columns: Tensor) -> Tensor:
    """Return the energy of each PCA channel of what a head adds to the layer's output, falling, [H, d].

    Args:
        second: (centred) second moment of each head's channels, [H, d, d], float64.
        columns: weights that read them, [out, H, d].
    """
    read = columns.to(second).transpose(0, 1)  # (H, out, d)
    return _between(second, read.mT @ read)


def falling_eigenvalues(second: Tensor) -> Tensor:
    """Return the eigenvalues of second moments [..., d, d], largest first; negative ones count as 0."""
    values: Tensor = torch.linalg.eigvalsh(second)
    return values.clamp_min(0).flip(-1)


def effective_rank(energies: Tensor, share: float) -> Tensor:
    """Return the least number of leading channels that hold ``share`` of the energy, [H], at least 1.

    >>> effective_rank(torch.tensor([[6.0, 3.0, 1.0], [0.0, 0.0, 0.0]]), 0.9)
    tensor([2, 1])

    Args:
        energies: falling, not negative, [H, d].
        share: in 0..1.
    """
    held = energies.cumsum(-1)
    # The rounding of a sum must not cost a channel.
    wanted = share * held[..., -1:] * (1 - 1e-12)
    return (held < wanted).sum(-1).clamp_max(energies.shape[-1] - 1) + 1


def _between(one: Tensor, other: Tensor) -> Tensor:
    """Return the eigenvalues of R other R with R the root of ``one``, falling."""
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)  # (H, d, d); R up to a rotation
    inner = root.mT @ other @ root
    return falling_eigenvalues((inner + inner.mT) / 2)
