"""Linear attention: what each channel adds to its weights and to its output. The formulas are ours."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6
"""Constant that linear attention adds to the sum of its weights."""


def linear_attention_energy(query: Tensor, key: Tensor) -> Tensor:
    """Return ||A - A without channel i||_F^2 of linear attention, sum over images, [H, d].

    A's rows are normalised: A_nj = q_n . k_j / (sum_j q_n . k_j + N * 1e-6). Features are not recomputed: if
    they were normalised over all channels, they are not normalised again without channel i.

    Args:
        query: non-negative features, [B, H, N, d].
        key: non-negative features, [B, H, M, d].
    """
    query, key = query.double(), key.double()
    weights, mean = _weights(query, key)
    gram = key.mT @ key / key.shape[-2] ** 2
    along, square = _along_output(weights, gram)
    mean = mean.unsqueeze(-2)
    first = gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) - 2 * along * mean + square * mean.square()
    left = 1 - weights * mean  # of the denominator, (B, H, N, d)
    lost = (weights / left.clamp_min(EPSILON)).square() * first.clamp_min(0)
    # Without its only channel, nothing is left of a token that the epsilon would not drown.
    return torch.where(left < EPSILON, square, lost).sum(-2).sum(0)


def linear_contributions(query: Tensor, key: Tensor, value: Tensor, output_gram: Tensor) -> Tensor:
    """Return the second moment of what each channel adds to the output of linear attention, [H, d, d].

    To first order: without channel i, output n moves by -q_ni (kv_i - out_n km_i) / (sum of its weights),
    with kv the mean of k v^T and km that of k. Summed over tokens and images: without a set S of channels,
    the output moves by a squared distance of about the sum over S x S.

    Args:
        query: non-negative features, [B, H, N, d].
        key: non-negative features, [B, H, M, d].
        value: [B, H, M, d_v].
        output_gram: W^T W of the weights that read each head's output, [H, d_v, d_v].
    """
    query, key, value = query.double(), key.double(), value.double()
    weights, mean = _weights(query, key)
    keys_values = key.mT @ value / key.shape[-2]  # (B, H, d, d_v)
    gram = keys_values @ output_gram.to(query) @ keys_values.mT
    along, square = _along_output(weights, gram)
    cross = ((weights * along).mT @ weights) * mean.unsqueeze(-2)
    parts = (weights.mT @ weights) * gram
    outer = ((weights * square).mT @ weights) * mean.unsqueeze(-1) * mean.unsqueeze(-2)
    return (parts - cross - cross.mT + outer).sum(0)


def _weights(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries over the sum of their weights, [B, H, N, d], and the mean key, [B, H, d]."""
    mean = key.mean(-2)
    return query / (query @ mean.unsqueeze(-1) + EPSILON), mean


def _along_output(weights: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return products with the output: of each channel's part, [B, H, N, d]; of the output, [B, H, N, 1]."""
    along = weights @ gram
    return along, (along * weights).sum(-1, keepdim=True)
