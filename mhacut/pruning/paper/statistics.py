"""Similarity of channels and change of attention without each, from which indicators start.

Source: channel-similarity weights and "initialization ... based on difference of attention between original
structure and each channel" are the idea of "Automatic Channel Pruning for Multi-Head Attention" (arXiv
2405.20867, abstract); the formulas are ours, as its equations were not available.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class UnitStatistics:
    """Initial values of a unit's indicators follow from these.

    Tokens are weighted as in the moments for v's outputs and hidden channels.
    """

    redundancy: Tensor
    """Mean similarity of each channel to the others of its head, [H, d], in [0, 1]."""
    difference: Tensor
    """||A - A without the channel||_F, [H, d]: of the logits for qk, of the layer's output otherwise."""


def logit_energy(query: Tensor, key: Tensor, *, centre: bool = True) -> Tensor:
    """Return the squared Frobenius norm of what each qk channel adds to the logits, sum over images, [H, d].

    ||A - A without channel i||_F for A = Q K^T is ||q_i|| * ||k_i||, exactly. What is constant over keys
    does not pass the softmax, so each key channel is centred over the tokens of its image first.

    Args:
        query: [B, H, N, d].
        key: [B, H, M, d].
        centre: False if something acts on keys before the product, so that their constant part matters.
    """
    if centre:
        key = key - key.mean(dim=-2, keepdim=True)
    return (query.square().sum(-2) * key.square().sum(-2)).sum(0)


def output_energy(second_moment: Tensor, output_projection: Tensor) -> Tensor:
    """Return the squared Frobenius norm of what each v or hidden channel adds to the output, [H, d].

    Args:
        second_moment: sum of squares of the channel over all tokens, [H, d].
        output_projection: columns that read it, [out, H, d].
    """
    return second_moment * output_projection.square().sum(0)


def cosine_similarity(gram: Tensor) -> Tensor:
    """Return the cosines between channels, [..., d, d], from their second moments ``gram`` [..., d, d].

    A channel that is always zero is similar to nothing: its row and column are 0, its diagonal 1.
    """
    norm = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    inverse = torch.where(norm > 0, 1 / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)
    cosine = (gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)).clamp(-1, 1)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return cosine * (1 - identity) + identity


def redundancy(*cosines: Tensor) -> Tensor:
    """Return the mean absolute similarity of each channel to the others of its head, in [0, 1], [..., d].

    With several cosine matrices, channels are similar if they are similar in all of them: for a rank-1 term
    q_i k_i^T of the logits, cos(q_i k_i^T, q_j k_j^T) = cos(q_i, q_j) * cos(k_i, k_j).

    Args:
        cosines: each [..., d, d].
    """
    joint = torch.ones_like(cosines[0])
    for cosine in cosines:
        joint = joint * cosine.abs()
    others = joint.shape[-1] - 1
    if others == 0:
        return joint.new_zeros(joint.shape[:-1])
    return (joint.sum(-1) - joint.diagonal(dim1=-2, dim2=-1)) / others


def similarity_weight(redundancy: Tensor) -> Tensor:
    """Return (1 - r) / mean(1 - r) over the head, [..., d]: above 1 for a channel unlike the others."""
    distinct = 1 - redundancy
    mean = distinct.mean(-1, keepdim=True)
    return torch.where(mean > 0, distinct / mean.clamp_min(torch.finfo(mean.dtype).tiny), 1.0)
