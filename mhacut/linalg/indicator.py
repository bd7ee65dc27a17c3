"""Indicators: one learnable number per channel, and the mask that follows from it.

Source: indicators, their score adjustment and their initialisation are the idea of arXiv 2405.20867; raw
numbers started at 0.6, cut at 1/2 with a straight-through gradient, are the template of the same lab's
earlier code ("Pruning from Scratch via Shared Pruning Module", WACV 2024). The formulas between are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

THRESHOLD = 0.5
START = 0.6
_SPREAD = 0.03
"""Distance of start values from START per standard deviation: three of them stay above the threshold."""


def initial_indicator(difference: Tensor | None, shape: tuple[int, int], weight: Tensor) -> Tensor:
    """Return start values m [H, d] such that every score ``weight * m`` lies above the threshold.

    Args:
        difference: change of attention without each channel, [H, d]; None starts all channels alike.
        shape: (H, d).
        weight: similarity weight of each channel, [H, d], positive mean 1 per head.
    """
    start = torch.full(shape, START, dtype=weight.dtype, device=weight.device)
    if difference is not None and shape[1] > 1:
        logs = difference.clamp_min(torch.finfo(difference.dtype).tiny).log()
        spread = logs.std(dim=-1, keepdim=True)
        z = torch.where(spread > 0, (logs - logs.mean(-1, keepdim=True)) / spread.clamp_min(1e-12), 0.0)
        start = start + _SPREAD * z.clamp(-3, 3).to(start)
    margin = 1e-3
    return start + (THRESHOLD + margin - (start * weight).amin(dim=-1, keepdim=True)).clamp_min(
        0
    ) / weight.clamp_min(1e-6)


def straight_through_mask(score: Tensor) -> Tensor:
    """Return 1 where ``score`` > 1/2, else 0; the gradient passes as if this were the identity."""
    hard = (score > THRESHOLD).to(score.dtype)
    return hard + (score - score.detach())


def adjust_scores(score: Tensor, width: int) -> Tensor:
    """Return scores shifted head by head so that exactly ``width`` channels of each lie above 1/2.

    tau_h is the midpoint between the width-th and the next largest score of head h; s' = s + (1/2 - tau_h).
    Ties are broken by channel index, for which tied scores may be moved apart slightly.

    Args:
        score: [H, d].
        width: channels to keep per head, 1 <= width <= d.
    """
    _heads, channels = score.shape
    order = score.detach().sort(dim=-1, descending=True, stable=True)
    last_kept = order.values[:, width - 1]
    first_cut = last_kept - 1 if width == channels else order.values[:, width]
    tau = (last_kept + first_cut) / 2
    adjusted = score + (THRESHOLD - tau)[:, None]
    kept = torch.zeros_like(score, dtype=torch.bool).scatter(-1, order.indices[:, :width], True)
    # Changes only scores on the wrong side: equal ones, and those that rounding put there.
    wrong = kept != (adjusted.detach() > THRESHOLD)
    side = THRESHOLD + 4 * torch.finfo(score.dtype).eps * kept.to(score.dtype)
    return torch.where(wrong, side + (adjusted - adjusted.detach()), adjusted)


def top_channels(score: Tensor, width: int) -> tuple[tuple[int, ...], ...]:
    """Return the ``width`` best channels of each head, ascending; ties go to the lower index.

    Args:
        score: [H, d], finite.
        width: 1 <= width <= d.
    """
    if not torch.isfinite(score).all():
        raise ValueError("scores must be finite: NaN would rank highest")
    best = score.sort(dim=-1, descending=True, stable=True).indices[:, :width]
    return tuple(tuple(row) for row in best.sort(dim=-1).values.tolist())
