"""How much attention changes when one channel goes: the start of the indicators.

Source: "initialization ... based on difference of attention between original structure and each channel"
(arXiv 2405.20867, abstract); the formulas are ours.
"""

from __future__ import annotations

from torch import Tensor


def logit_energy(query: Tensor, key: Tensor) -> Tensor:
    """Squared Frobenius norm of what each qk channel adds to the logits, summed over images, [H, d].

    ||A - A without channel i||_F for A = Q K^T is ||q_i|| * ||k_i||, exactly. What is constant over keys
    does not pass the softmax, so each key channel is centred over the tokens of its image first.

    Args:
        query: [B, H, N, d].
        key: [B, H, M, d].
    """
    centred = key - key.mean(dim=-2, keepdim=True)
    return (query.square().sum(-2) * centred.square().sum(-2)).sum(0)


def output_energy(second_moment: Tensor, readout: Tensor) -> Tensor:
    """Squared Frobenius norm of what each v or hidden channel adds to the layer's output, [H, d].

    Args:
        second_moment: sum of squares of the channel over all tokens, [H, d].
        readout: the columns that read it, [out, H, d].
    """
    return second_moment * readout.square().sum(0)
