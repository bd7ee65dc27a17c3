"""Redundancy of heads before a cut: similarity and rank of their channels, and which of them would stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Unit
from mhacut.linalg.moments import Moments
from mhacut.linalg.spectrum import effective_rank, falling_eigenvalues, logit_energies, output_energies
from mhacut.options.prune import SearchOptions
from mhacut.pruning.candidates import find_candidates
from mhacut.pruning.unit_sums import UnitMoments
from mhacut.surgery.channels import effective_output_weights

SHARES = (75, 50, 25)
"""Percentages of its width for which each head lists the channels that it would keep."""


@dataclass(frozen=True)
class HeadFindings:
    """Findings about the channels of one kind of one head."""

    similarity: float
    """Mean absolute similarity of a channel to the others of the head, in 0..1; 0 if none are similar."""
    rank90: int
    """Number of principal channels with 90 % of the energy of the logits (qk) or of the head's output (v)."""
    rank99: int
    """The same at 99 %."""
    keeps: Mapping[int, tuple[int, ...]]
    """For each percentage of :data:`SHARES`, the channels that a cut of the width to it would keep: their
    indices in the file, chosen by the error that is left after repair. Empty if channels were not ranked."""


def describe_heads(
    module: nn.Module, unit: Unit, moments: UnitMoments, similarity: Tensor, *, ranked: bool
) -> tuple[HeadFindings, ...]:
    """Return the findings of each head of ``unit``.

    Args:
        module: the layer.
        unit: qk or v of that layer.
        moments: moments of the unit's channels.
        similarity: mean similarity of each channel to the others of its head, [H, d].
        ranked: rank channels too, which takes most of the time.
    """
    energies = _energies(module, unit, moments)  # (H, d)
    rank90, rank99 = (effective_rank(energies, share).tolist() for share in (0.90, 0.99))
    keeps = _channels_to_keep(module, unit, moments) if ranked else [{} for _ in range(unit.heads)]
    return tuple(
        HeadFindings(float(similarity[head].mean()), rank90[head], rank99[head], keeps[head])
        for head in range(unit.heads)
    )


def _channels_to_keep(
    module: nn.Module, unit: Unit, moments: UnitMoments
) -> list[dict[int, tuple[int, ...]]]:
    """Per head, the channels to keep at each of :data:`SHARES`."""
    widths = {share: max(1, round(unit.width * share / 100)) for share in SHARES}
    options = SearchOptions(basis="channel", positions="own")
    candidate = find_candidates(module, unit, moments, min(widths.values()), options)[0]
    kept = {share: candidate.ranking.kept(width).tolist() for share, width in widths.items()}
    return [{share: tuple(heads[head]) for share, heads in kept.items()} for head in range(unit.heads)]


def _energies(module: nn.Module, unit: Unit, moments: UnitMoments) -> Tensor:
    """Energies of the principal channels of every head, falling, [H, d]."""
    every = moments.every
    if unit.linear:  # products of q, k and v: there are no logits, only energy to sum
        return falling_eigenvalues(every[0].energy)
    if unit.kind == "qk":
        return logit_energies(every[0].energy, every[1].energy)
    own = _per_head(unit, every[0])
    second = own.covariance if unit.constants_pass else own.energy
    return output_energies(second, effective_output_weights(module, unit).view(-1, unit.heads, unit.width))


def _per_head(unit: Unit, moments: Moments) -> Moments:
    """Moments of each head by itself, [H, d, d], from those of all channels at once, [H * d, H * d]."""
    blocks = moments.second.view(unit.heads, unit.width, unit.heads, unit.width)
    second = torch.stack([blocks[head, :, head] for head in range(unit.heads)])  # (H, d, d)
    return Moments(moments.rows, moments.total.view(unit.heads, unit.width), second)
