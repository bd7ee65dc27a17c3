"""Swap kept channels for removed ones, as long as that lowers the error left after the refit. Ours.

Greedy removal never takes a step back. With the width given, a kept and a removed channel of a head that
trade places may leave less. What the first costs and the second then gains have closed forms, so that all
pairs are weighed at once, from the quantities of the sweep operator of stepwise regression (Goodnight 1979).
On the MLPs of a CIFAR-10 ViT, cut to 1/2, 1/4 and 1/12, up to 42 swaps left 2 to 12 % less squared error
than greedy removal, on images held out too. Of the whole model (``balanced``, 256 images, 5,000 validation
images) the divergence at 25 and 12.5 % of the FLOPs fell by 2 and 5 % (seed 42) and by 6 and 2 % (seed 1),
with errors weighed by the Fisher information; with plain ones it fell by 2 and rose by 2 %, and fell by 5
and 2 %. A round costs what inverting the moments of the kept channels costs.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from mhacut.linalg.reconstruction import others, symmetric_root, weighed_by
from mhacut.linalg.selection import AT_ONCE, TINY, damped

LEAST_GAIN = 1e-4
"""Share of the error that a round of swaps must channel scale."""
ROUNDING = 1e-9
"""Share of the output's energy under which an error is rounding."""


def exchange_channels(second: Tensor, columns: Tensor, kept: Tensor, fisher: Tensor | None = None) -> Tensor:
    """Improve a choice of channels that are refitted together.

    Args:
        second: (centred) second moment of all channels, [heads * d, heads * d], float64.
        columns: the weights that read them, [out, heads * d], or [places * out, heads * d], those of a place
            together.
        kept: channels of every head, [heads, width], fewer than d.
        fisher: of errors of the output, [out, out], float64; None is plain squared error.

    Returns:
        As many, ascending, [heads, width]: no swap within a head lowers their error by more than
        :data:`LEAST_GAIN` of it.
    """
    heads, width = kept.shape
    channels = second.shape[0] // heads
    offsets = channels * torch.arange(heads, device=kept.device)[:, None]
    gram = damped(second)
    effective_output_weights = columns.to(gram)
    if fisher is not None:
        effective_output_weights = weighed_by(symmetric_root(fisher), effective_output_weights)
    effective_output_weights = effective_output_weights.mT
    wanted = gram @ effective_output_weights
    energy = float((effective_output_weights * wanted).sum())
    rounding = ROUNDING * energy
    chosen = _Choice(gram, wanted, (kept + offsets).flatten(), channels)
    count = max(1, int(AT_ONCE * heads * width))
    while count > 0:
        leaving, coming = (side[:count] for side in chosen.swaps)
        changed = chosen.exchanged(leaving, coming)
        if changed.served - chosen.served > LEAST_GAIN * max(energy - chosen.served, rounding):
            chosen = changed
        else:  # each helps alone, not all together
            count = min(count, len(leaving)) // 2
    return chosen.kept.sort().values.view(heads, width) - offsets


class _Choice:
    """Some of the channels, and what a swap is worth."""

    def __init__(self, gram: Tensor, wanted: Tensor, kept: Tensor, channels: int) -> None:
        """Refit.

        Args:
            gram: of all channels, [n, n], float64, regular.
            wanted: of channels and the output, [n, out].
            kept: which, of n.
            channels: per head.
        """
        self.gram, self.wanted, self.kept, self.channels = gram, wanted, kept, channels
        self.gone = others(kept, len(gram))
        self.inverse = torch.linalg.inv(gram[kept][:, kept])
        self.weights = self.inverse @ wanted[kept]
        """Of the refit, [kept, out]."""
        self.served = float((self.weights * wanted[kept]).sum())
        """Energy of the output that it gives."""

    @cached_property
    def swaps(self) -> tuple[Tensor, Tensor]:
        """Disjoint pairs that each channel scale, best first: places in ``kept`` and in ``gone``."""
        between = self.gram[self.kept][:, self.gone]
        share = self.inverse @ between
        """Of kept channels in those removed, [kept, gone]."""
        missed = self.wanted[self.gone] - share.mT @ self.wanted[self.kept]
        own = self.gram.diagonal()[self.gone] - (between * share).sum(0)
        pivot = self.inverse.diagonal()[:, None]
        square = self.weights.square().sum(1)[:, None]
        # Without kept i, removed j misses missed_j + more_ij weights_i, and has share_ij more_ij more energy.
        more = share / pivot
        missing = missed.square().sum(1) + 2 * more * (self.weights @ missed.mT) + more.square() * square
        channel_scale = missing / (own + share * more).clamp_min(TINY) - square / pivot
        channel_scale[(self.kept // self.channels)[:, None] != self.gone // self.channels] = 0
        best, partner = channel_scale.max(1)
        pairs: dict[int, int] = {}
        for place in best.sort(descending=True, stable=True).indices.tolist():
            if best[place] <= 0:
                break
            pairs.setdefault(int(partner[place]), place)
        leaving, coming = (
            torch.tensor(list(side), device=channel_scale.device) for side in (pairs.values(), pairs)
        )
        return leaving.long(), coming.long()

    def exchanged(self, leaving: Tensor, coming: Tensor) -> _Choice:
        kept = self.kept.clone()
        kept[leaving] = self.gone[coming]
        return _Choice(self.gram, self.wanted, kept, self.channels)
