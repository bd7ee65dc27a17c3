"""Channel similarity and attention difference, the start values of indicators.

The idea is from the abstract of "Automatic Channel Pruning for Multi-Head Attention" (arXiv 2405.20867). Its
equations were not available, so the formulas are our own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class UnitStatistics(NamedTuple):
    """Statistics that give the initial indicators of a unit."""

    redundancy: Tensor
    """Mean similarity of each channel to the other channels of its head, [heads, d], in [0, 1]."""
    difference: Tensor
    """Frobenius norm of the change without the channel, [heads, d]: of attention logits for q/k channels,
    else of the layer's output."""


def logit_energy(query: Tensor, key: Tensor, *, centre: bool = True) -> Tensor:
    """Return the squared Frobenius norm of each qk channel's part of the logits, summed over images, [H, d].

    Channel i adds q_i k_i^T to the logits, with norm ||q_i|| * ||k_i||. Keys are centred over each image: the
    softmax ignores constants over keys. ``centre`` is False if keys are transformed before the product.
    """
    if centre:
        key = key - key.mean(dim=-2, keepdim=True)
    return (query.square().sum(-2) * key.square().sum(-2)).sum(0)


def output_energy(second_moment: Tensor, output_projection: Tensor) -> Tensor:
    """Return the squared Frobenius norm of each v or hidden channel's part of the output, [H, d]."""
    return second_moment * output_projection.square().sum(0)


def cosine_similarity(gram: Tensor) -> Tensor:
    """Return the cosines between channels from their second moments ``gram`` [..., d, d]."""
    norm = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    # A channel that is always 0 is similar to no other channel.
    inverse = torch.where(norm > 0, 1 / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)
    cosine = (gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)).clamp(-1, 1)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return cosine * (1 - identity) + identity


def redundancy(*cosines: Tensor) -> Tensor:
    """Return the mean absolute similarity of each channel to the others of its head, [..., d].

    Channels are similar if they are similar in all ``cosines`` [..., d, d]: cos(q_i k_i^T, q_j k_j^T) =
    cos(q_i, q_j) * cos(k_i, k_j).
    """
    joint = torch.ones_like(cosines[0])
    for cosine in cosines:
        joint = joint * cosine.abs()
    others = joint.shape[-1] - 1
    if others == 0:
        return joint.new_zeros(joint.shape[:-1])
    return (joint.sum(-1) - joint.diagonal(dim1=-2, dim2=-1)) / others


def similarity_weight(redundancy: Tensor) -> Tensor:
    """Return (1 - r) / mean(1 - r) over the head, [..., d]: above 1 for a distinctive channel."""
    distinct = 1 - redundancy
    mean = distinct.mean(-1, keepdim=True)
    return torch.where(mean > 0, distinct / mean.clamp_min(torch.finfo(mean.dtype).tiny), 1.0)
