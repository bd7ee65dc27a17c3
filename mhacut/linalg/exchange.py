"""Exchange of kept channels for removed ones while that lowers the error left after the refit. Ours.

Greedy removal never undoes a step. At a given width, exchanging a kept and a removed channel of a head may
leave less error. The cost of losing the first and the gain of the second then have closed forms, so all pairs
are compared at once, by the quantities of the sweep operator of stepwise regression (Goodnight 1979). A round
costs as much as inverting the moments of the kept channels.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from mhacut.linalg.reconstruction import others, symmetric_root, weighed_by
from mhacut.linalg.selection import AT_ONCE, TINY, damped

LEAST_GAIN = 1e-4
"""Fraction of the error by which a round of exchanges must lower it."""
ROUNDING = 1e-9
"""Fraction of the output's energy under which an error is rounding."""


def exchange_channels(second: Tensor, columns: Tensor, kept: Tensor, fisher: Tensor | None = None) -> Tensor:
    """Improve a choice of channels that are refitted together.

    Args:
        second: (centred) second moment of all channels, [heads * d, heads * d], float64.
        columns: weights that read them, [out, heads * d]; [places * out, heads * d] where they are read at
            several places, those of a place together.
        kept: channels of every head, [heads, width], fewer than d.
        fisher: Fisher information of the output, [out, out], float64; None is plain squared error.

    Returns:
        Channels of every head, ascending, [heads, width]: no exchange within a head lowers their error by
        more than :data:`LEAST_GAIN` of it.
    """
    heads, width = kept.shape
    channels = second.shape[0] // heads
    offsets = channels * torch.arange(heads, device=kept.device)[:, None]
    gram = damped(second)
    weights = columns.to(gram)
    if fisher is not None:
        weights = weighed_by(symmetric_root(fisher), weights)
    wanted = gram @ weights.mT  # (heads * d, out)
    energy = float((weights.mT * wanted).sum())
    rounding = ROUNDING * energy
    chosen = _Choice(gram, wanted, (kept + offsets).flatten(), channels)
    count = max(1, int(AT_ONCE * heads * width))
    while count > 0:
        leaving, coming = (side[:count] for side in chosen.exchanges)
        changed = chosen.exchanged(leaving, coming)
        if changed.served - chosen.served > LEAST_GAIN * max(energy - chosen.served, rounding):
            chosen = changed
        else:  # each helps alone, but not all together
            count = min(count, len(leaving)) // 2
    return chosen.kept.sort().values.view(heads, width) - offsets


class _Choice:
    """A choice of channels, refitted, and the gain of its exchanges."""

    def __init__(self, gram: Tensor, wanted: Tensor, kept: Tensor, channels: int) -> None:
        """Refit.

        Args:
            gram: second moment of all channels, [n, n], float64, regular.
            wanted: cross moment of channels and the output, [n, out].
            kept: chosen channels, of n.
            channels: channels per head.
        """
        self.gram, self.wanted, self.kept, self.channels = gram, wanted, kept, channels
        self.gone = others(kept, len(gram))
        self.inverse = torch.linalg.inv(gram[kept][:, kept])
        self.weights = self.inverse @ wanted[kept]
        """Weights of the refit, [kept, out]."""
        self.served = float((self.weights * wanted[kept]).sum())
        """Energy of the output of the refit."""

    @cached_property
    def exchanges(self) -> tuple[Tensor, Tensor]:
        """Disjoint pairs that each lower the error, best first: places in ``kept`` and in ``gone``."""
        between = self.gram[self.kept][:, self.gone]
        share = self.inverse @ between
        """Coefficients of kept channels in removed ones, [kept, gone]."""
        missed = self.wanted[self.gone] - share.mT @ self.wanted[self.kept]
        own = self.gram.diagonal()[self.gone] - (between * share).sum(0)
        pivot = self.inverse.diagonal()[:, None]
        square = self.weights.square().sum(1)[:, None]
        # Without kept i, removed j would save by missed_j + more_ij weights_i, and has share_ij more_ij more
        # energy of its own.
        more = share / pivot
        missing = missed.square().sum(1) + 2 * more * (self.weights @ missed.mT) + more.square() * square
        gain = missing / (own + share * more).clamp_min(TINY) - square / pivot
        gain[(self.kept // self.channels)[:, None] != self.gone // self.channels] = 0
        best, partner = gain.max(1)
        pairs: dict[int, int] = {}
        for place in best.sort(descending=True, stable=True).indices.tolist():
            if best[place] <= 0:
                break
            pairs.setdefault(int(partner[place]), place)
        leaving, coming = (torch.tensor(list(side), device=gain.device) for side in (pairs.values(), pairs))
        return leaving.long(), coming.long()

    def exchanged(self, leaving: Tensor, coming: Tensor) -> _Choice:
        kept = self.kept.clone()
        kept[leaving] = self.gone[coming]
        return _Choice(self.gram, self.wanted, kept, self.channels)
