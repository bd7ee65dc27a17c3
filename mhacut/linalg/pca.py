"""PCA bases: rotations of a head's channels that concentrate energy in the first channels.

Attention is invariant when (W_q, W_k) of a head become (A W_q, A^-T W_k), and when value rows become A W_v
and the columns that read them W_o A^-1. Cutting the last channels of the right basis is the best
approximation of that rank (Eckart & Young 1936).
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLOOR = 1e-10
"""Minimum eigenvalue, relative to the largest. It keeps the basis invertible."""
_NOTHING = 1e-30
"""Logits of smaller magnitude are treated as rounding errors."""


def logit_basis(query: Tensor, key: Tensor) -> Tensor:
    """Return A [H, d, d], strongest channels first, with q' = A q and k' = A^-T k.

    For R_q and R_k the symmetric roots of the second moments [H, d, d] and R_q R_k = U S V^T, the first w
    channels of A = S^1/2 U^T R_q^-1 give the best rank-w approximation of the logits. q and k are assumed
    independent, and keys must be centred over each image.
    """
    root, inverse = _roots(query)
    u, s, _ = torch.linalg.svd(root @ _roots(key)[0])
    largest = s[..., :1].clamp_min(torch.finfo(s.dtype).tiny)
    # Nothing is left of a single key once it is centred, so that any size will do. That of rounding would be
    # beyond the range of single precision.
    s = torch.where(largest > _NOTHING, s, s / largest)
    size = s.clamp_min(s[..., :1] * _FLOOR).clamp_min(torch.finfo(s.dtype).tiny).sqrt()
    basis: Tensor = size.unsqueeze(-1) * u.transpose(-2, -1) @ inverse
    return basis


def output_basis(second: Tensor, columns: Tensor) -> Tensor:
    """Return an orthogonal A [H, d, d] with v' = A v, ordered by contribution to the layer's output.

    ``second`` [H, d, d] is the second moment of each head's output, and ``columns`` [out, H, d] of the output
    projection read it. The first w rows of A span the row space of the best rank-w approximation.
    """
    read = columns.to(second).transpose(0, 1)  # (H, out, d)
    u, _, _ = torch.linalg.svd(read @ _roots(second)[0], full_matrices=False)
    # Householder QR: an orthogonal basis whose first w rows span the first w of U^T W, arbitrarily completed.
    orthogonal: Tensor = torch.linalg.qr((u.mT @ read).mT, mode="complete").Q
    return orthogonal.mT


def _roots(second: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(second)
    least = (values[..., -1:] * _FLOOR).clamp_min(torch.finfo(values.dtype).tiny)
    root = values.clamp_min(least).sqrt().unsqueeze(-2)
    return vectors * root @ vectors.mT, vectors / root @ vectors.mT


def logit_energies(query: Tensor, key: Tensor) -> Tensor:
    """Return the energy of each principal channel of the logits, descending, [H, d]."""
    # The squared singular values of R_q R_k are the eigenvalues of R_q K R_q.
    return _between(query, key)


def output_energies(second: Tensor, columns: Tensor) -> Tensor:
    """Return the energy of each principal channel of a head's output, descending, [H, d]."""
    read = columns.to(second).transpose(0, 1)  # (H, out, d)
    return _between(second, read.mT @ read)


def falling_eigenvalues(second: Tensor) -> Tensor:
    values: Tensor = torch.linalg.eigvalsh(second)
    return values.clamp_min(0).flip(-1)


def effective_rank(energies: Tensor, share: float) -> Tensor:
    """Return the number of leading channels of each head that hold the fraction ``share`` of ``energies``."""
    held = energies.cumsum(-1)
    # The rounding of a sum must not cost a channel.
    wanted = share * held[..., -1:] * (1 - 1e-12)
    return (held < wanted).sum(-1).clamp_max(energies.shape[-1] - 1) + 1


def _between(first: Tensor, second: Tensor) -> Tensor:
    """Return the eigenvalues of R ``second`` R, descending; R is the square root of ``first``."""
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)  # (H, d, d); R up to a rotation
    inner = root.mT @ second @ root
    # Symmetric but for rounding, and the solver reads only one triangle.
    return falling_eigenvalues((inner + inner.mT) / 2)
