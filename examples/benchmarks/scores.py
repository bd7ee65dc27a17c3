"""How the answers of a model compare with those of the dense model and with the labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

HALVES = {"even": 0, "odd": 1}
"""Halves of the validation images, by their first index: choose on one, report the other."""


def scores_of(reference: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """:func:`score` on all images, and under ``halves`` on those of even and of odd index."""
    halves = {
        name: score(reference[start::2], logits[start::2], labels[start::2]) for name, start in HALVES.items()
    }
    return {**score(reference, logits, labels), "halves": halves}


def score(reference: Tensor, logits: Tensor, labels: Tensor) -> dict[str, float]:
    """How a model does on n images.

    Args:
        reference: the dense model's logits, [n, classes].
        logits: the model's.
        labels: [n].

    Returns:
        ``top1`` in percent; ``agreement``, percent of the images where the first answer is the dense model's;
        ``kl``, KL(dense || slim) in nats, mean over the images; ``images``, n.
    """
    p, q = reference.double().log_softmax(1), logits.double().log_softmax(1)
    answers = logits.argmax(1)
    return {
        "top1": 100 * float((answers == labels).double().mean()),
        "agreement": 100 * float((answers == reference.argmax(1)).double().mean()),
        "kl": float((p.exp() * (p - q)).sum(1).mean()),
        "images": len(labels),
    }


def of_half(row: Mapping[str, Any], half: str) -> dict[str, Any]:
    """A row with the scores of one half of the validation images, or of all."""
    return dict(row) if half == "all" or "out_of_reach" in row else {**row, **row["halves"][half]}


def best_of(scores: Mapping[str, Mapping[str, float]]) -> str:
    """The temperature at which KL is least: it tells more than top-1 of as many images."""
    return min(scores, key=lambda name: scores[name]["kl"])
