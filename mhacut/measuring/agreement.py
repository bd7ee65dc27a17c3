"""Compare the outputs of two programs that should compute the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """Agreement of a program's outputs with those of the model that it was made from."""

    images: int
    kl: float | None
    """Mean KL divergence of the program's classes from the model's, in nats; None if the outputs are not
    logits."""
    same_answer: float | None
    """Fraction of images with the same top-1 class; None if the outputs are not logits."""
    cosine: float
    """Mean cosine between the outputs of an image."""


def agreement(expected: Tensor, found: Tensor, *, classes: bool) -> Agreement:
    """Return how far ``found`` agrees with ``expected``, both [B, outputs], or [B, ...] without classes.

    Args:
        expected: outputs of the model.
        found: outputs of the program, for the same images.
        classes: whether outputs are logits of classes.
    """
    p, q = expected.double().flatten(1), found.double().flatten(1)
    cosine = float(F.cosine_similarity(p, q).mean())
    if not classes:
        return Agreement(len(p), None, None, cosine)
    # In float64: the KL divergence of a good export is far below what float32 resolves.
    log_p, log_q = p.log_softmax(dim=1), q.log_softmax(dim=1)
    kl = float((log_p.exp() * (log_p - log_q)).sum(dim=1).mean())
    same = float((p.argmax(dim=1) == q.argmax(dim=1)).double().mean())
    return Agreement(len(p), max(kl, 0.0), same, cosine)  # rounding can leave a little less than nothing
