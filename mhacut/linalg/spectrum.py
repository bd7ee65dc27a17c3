"""How many principal channels a head really uses: the spectrum of what it adds, and its effective rank.

Ours. The energies are those that a cut in the principal basis (:mod:`mhacut.linalg.pca`) loses from the
tail on, so that a rank at 99 % says what width such a cut could keep before anything is refitted.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logit_energies(query: Tensor, key: Tensor) -> Tensor:
    """Energy of each principal channel of the logits q k^T, falling, [H, d].

    The squared singular values of R_q R_k, with R the symmetric roots of the second moments, which are the
    eigenvalues of R_q K R_q.

    Args:
        query: second moment of q, [H, d, d], float64.
        key: of k, centred over the keys of each image.
    """
    return _between(query, key)


def output_energies(second: Tensor, columns: Tensor) -> Tensor:
    """Energy of each principal channel of what a head adds to the layer's output, falling, [H, d].

    Args:
        second: (centred) second moment of each head's channels, [H, d, d], float64.
        columns: the weights that read them, [out, H, d].
    """
    read = columns.to(second).transpose(0, 1)  # (H, out, d)
    return _between(second, read.mT @ read)


def falling_eigenvalues(second: Tensor) -> Tensor:
    """Eigenvalues of second moments [..., d, d], largest first; what is below 0 is rounding."""
    values: Tensor = torch.linalg.eigvalsh(second)
    return values.clamp_min(0).flip(-1)


def effective_rank(energies: Tensor, share: float) -> Tensor:
    """The fewest leading channels that hold ``share`` of the energy, [H], at least 1.

    >>> effective_rank(torch.tensor([[6.0, 3.0, 1.0], [0.0, 0.0, 0.0]]), 0.9)
    tensor([2, 1])

    Args:
        energies: falling, not negative, [H, d].
        share: in 0..1.
    """
    held = energies.cumsum(-1)
    # What rounding adds to a sum must not cost a channel.
    wanted = share * held[..., -1:] * (1 - 1e-12)
    return (held < wanted).sum(-1).clamp_max(energies.shape[-1] - 1) + 1


def _between(one: Tensor, other: Tensor) -> Tensor:
    """Eigenvalues of R other R with R the root of ``one``, falling."""
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)  # (H, d, d); R up to a rotation
    inner = root.mT @ other @ root
    return falling_eigenvalues((inner + inner.mT) / 2)
