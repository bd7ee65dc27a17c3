"""What can be said of heads before they are cut: how alike, how few, which channels would stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Unit
from mhacut.linalg.moments import Moments
from mhacut.linalg.spectrum import effective_rank, falling_eigenvalues, logit_energies, output_energies
from mhacut.pruning.calibrate import UnitMoments
from mhacut.pruning.candidates import find_candidates
from mhacut.surgery.output import effective_output_weights

SHARES = (75, 50, 25)
"""Percent of its width at which a head is asked which channels it would keep."""


@dataclass(frozen=True)
class HeadFindings:
    """One head's channels of one kind."""

    similarity: float
    """Mean absolute similarity of a channel to the others of the head, in 0..1: 0 is all unlike."""
    rank90: int
    """Principal channels that hold 90 % of the energy of the logits (qk) or of what the head adds (v)."""
    rank99: int
    """The same at 99 %."""
    keeps: Mapping[int, tuple[int, ...]]
    """Per percent of :data:`SHARES` the channels a cut to it would keep, in the file's own channels, by the
    error left after repair; empty when not asked for."""


def find(
    module: nn.Module, unit: Unit, moments: UnitMoments, similarity: Tensor, *, ranked: bool
) -> tuple[HeadFindings, ...]:
    """What there is to say of each head of ``unit``.

    Args:
        module: the layer.
        unit: qk or v of that layer.
        moments: of its channels.
        similarity: of each channel to the others of its head, [H, d].
        ranked: whether to rank channels, which takes most of the time.
    """
    energies = _energies(module, unit, moments)
    ranks = [effective_rank(energies, share).tolist() for share in (0.90, 0.99)]
    kept: list[dict[int, tuple[int, ...]]] = [{} for _ in range(unit.heads)]
    if ranked:
        widths = {share: max(1, round(unit.width * share / 100)) for share in SHARES}
        candidate = find_candidates(module, unit, moments, min(widths.values()), "channel", positions="own")[
            0
        ]
        for share, width in widths.items():
            for head, channels in enumerate(candidate.ranking.kept(width).tolist()):
                kept[head][share] = tuple(channels)
    return tuple(
        HeadFindings(float(similarity[head].mean()), ranks[0][head], ranks[1][head], kept[head])
        for head in range(unit.heads)
    )


def _energies(module: nn.Module, unit: Unit, moments: UnitMoments) -> Tensor:
    """Of the principal channels of every head, falling, [H, d]."""
    every = moments.every
    if unit.linear:  # what channels add can only be summed
        return falling_eigenvalues(every[0].energy)
    if unit.kind == "qk":
        return logit_energies(every[0].energy, every[1].energy)
    own = _per_head(unit, every[0])
    second = own.covariance if unit.constants_pass else own.energy
    return output_energies(second, effective_output_weights(module, unit).view(-1, unit.heads, unit.width))


def _per_head(unit: Unit, moments: Moments) -> Moments:
    """Moments of all channels at once, [H * d], as those of each head by itself, [H, d]."""
    blocks = moments.second.view(unit.heads, unit.width, unit.heads, unit.width)
    second = torch.stack([blocks[head, :, head] for head in range(unit.heads)])
    return Moments(moments.rows, moments.total.view(unit.heads, unit.width), second)
