"""Candidate cuts of a unit: a basis and an order in which channels are removed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Unit
from mhacut.linalg.moments import Moments
from mhacut.linalg.pca import logit_basis, output_basis
from mhacut.linalg.selection import (
    Ranking,
    rank_channels,
    rank_logit_channels,
    rank_parts,
    rank_shared_channels,
)
from mhacut.options.prune import SearchOptions
from mhacut.plan import Basis, UnitPlan
from mhacut.pruning.unit_moments import UnitMoments, block_diagonal
from mhacut.surgery.channels import effective_output_weights

FEW_ROWS = 2
"""Measure errors on held-out images if there are fewer rows per channel than this, since fits to few rows
overfit. Class attention and pooling heads have 1 row per image (docs/explanation/choices.md)."""


@dataclass(frozen=True)
class Candidate:
    """A channel basis of a unit, and the order in which channels of this basis are removed."""

    unit: Unit
    rotation: Tensor | None
    """Change of basis for :func:`mhacut.surgery.channels.rotate`, [heads, d, d]. None keeps the original
    channels."""
    ranking: Ranking
    unshared: bool = False
    """Whether tensors that several heads share are copied, so that each head can be cut differently."""

    @property
    def basis(self) -> Basis:
        return "channel" if self.rotation is None else "principal"

    def plan(self, width: int) -> UnitPlan:
        unit = self.unit
        if width == unit.width:
            return unit.keep_first(width)
        kept = self.ranking.kept(width).tolist()
        rows = tuple(map(tuple, kept))
        return UnitPlan(unit.layer, unit.kind, unit.width, rows, self.basis, self.unshared)


def find_candidates(
    module: nn.Module,
    unit: Unit,
    moments: UnitMoments,
    smallest: int,
    options: SearchOptions,
    fisher: Tensor | None = None,
) -> tuple[Candidate, ...]:
    """Return the allowed candidates for widths of at least ``smallest``, the most promising first."""
    candidates, refit = [], options.repair
    if unit.mixing == "rotate" and options.basis != "channel":
        rotation = _pca_rotation(module, unit, moments, refit)
        in_order = torch.arange(unit.width, device=rotation.device).expand(unit.heads, -1)
        candidates.append(Candidate(unit, rotation, Ranking(in_order)))
    shares, by_channel = unit.sharing != "own", not candidates or options.basis == "auto"
    # Heads that share filters keep their own channels at the price of a copy of the filters for each head.
    separate = options.positions != "equal" and unit.sharing != "tied"
    equal = options.positions != "own" or unit.sharing == "tied"
    if by_channel and (not shares or separate):
        ranking = _ranking(module, unit, moments, smallest, fisher, refit)
        candidates.append(Candidate(unit, None, ranking, shares))
    if by_channel and shares and equal and (unit.mixing == "select" or not refit):
        of_all_heads = _contributions(module, unit, moments).sum((0, 2))[None]  # (1, d, d)
        order = rank_parts(of_all_heads).order.expand(unit.heads, -1)
        candidates.append(Candidate(unit, None, Ranking(order)))
    elif by_channel and shares and equal:
        second = _second(unit, moments.every[0], refit)
        ranking = rank_shared_channels(second, effective_output_weights(module, unit), unit.heads, smallest)
        candidates.append(Candidate(unit, None, ranking))
    return tuple(candidates)


def few_rows(unit: Unit, moments: UnitMoments) -> bool:
    return moments.fit[0].rows < FEW_ROWS * unit.heads * unit.width


def _pca_rotation(module: nn.Module, unit: Unit, moments: UnitMoments, refit: bool) -> Tensor:
    every = moments.every
    if unit.kind == "qk":
        return logit_basis(every[0].energy, every[1].energy)
    second = _second(unit, every[0], refit).view(unit.heads, unit.width, unit.heads, unit.width)
    of_heads = torch.stack([second[head, :, head] for head in range(unit.heads)])
    columns = effective_output_weights(module, unit).view(-1, unit.heads, unit.width)  # (out, H, d)
    if unit.sharing == "tied":  # one basis, for what any head adds to the output
        columns = columns.flatten(0, 1)[:, None]
        return output_basis(of_heads.mean(0, keepdim=True), columns).expand(unit.heads, -1, -1)
    return output_basis(of_heads, columns)


def _ranking(
    module: nn.Module,
    unit: Unit,
    moments: UnitMoments,
    smallest: int,
    fisher: Tensor | None,
    refit: bool,
) -> Ranking:
    every = moments.every
    if unit.mixing == "select" or not refit:  # nothing stands in for a channel
        parts = _contributions(module, unit, moments)  # (H, d, H, d)
        return rank_parts(torch.stack([parts[head, :, head] for head in range(unit.heads)]))
    if unit.kind == "qk":
        return rank_logit_channels(every[0].energy, every[1].energy, smallest)
    second = _second(unit, every[0], refit)
    return rank_channels(second, effective_output_weights(module, unit), unit.heads, smallest, fisher)


def _contributions(module: nn.Module, unit: Unit, moments: UnitMoments) -> Tensor:
    """Return second moments of each channel's contribution to the logits or the output, [H, d, H, d]."""
    first = moments.every[0].energy
    if unit.kind == "qk" or unit.linear:
        # With q and k independent, E[(q_i k_i)(q_j k_j)] = E[q_i q_j] E[k_i k_j].
        terms = first if unit.linear else first * moments.every[1].energy
        return block_diagonal(terms).view(unit.heads, unit.width, unit.heads, unit.width)
    columns = effective_output_weights(module, unit)
    # What channels i and j add to the output has the product (w_i . w_j) E[x_i x_j].
    gram = columns.mT @ columns
    return (gram * first).view(unit.heads, unit.width, unit.heads, unit.width)


def _second(unit: Unit, moments: Moments, refit: bool) -> Tensor:
    """Return the second moment of the channels.

    It is centred if a bias or batch norm can absorb the channel means.
    """
    return moments.covariance if unit.constants_pass and refit else moments.energy
