"""How a unit could shrink: in which basis, and in which order its channels would go. Ours."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Unit
from mhacut.linalg.exchange import exchange_channels
from mhacut.linalg.moments import Moments
from mhacut.linalg.pca import logit_basis, output_basis
from mhacut.linalg.selection import (
    Ranking,
    Removal,
    rank_channels,
    rank_logit_channels,
    rank_parts,
    rank_shared_channels,
)
from mhacut.options.prune import BasisChoice, Positions
from mhacut.plan import Basis, UnitPlan
from mhacut.pruning.calibrate import UnitMoments
from mhacut.surgery.output import effective_output_weights

FEW_ROWS = 2
"""With fewer rows than that for each channel, of images to fit, errors are those on images held out: on
those they were fitted to, as many channels as there are rows leave none. (Class attention and pooling heads
see one row an image. With that, a CaiT of random weights at 70 % of its FLOPs had a divergence of .050 with
64 images and .033 with 256; without, .214 and .074.)"""


@dataclass(frozen=True)
class Candidate:
    """One way to shrink a unit."""

    unit: Unit
    rotation: Tensor | None
    """For :func:`mhacut.surgery.rotate.rotate`, [H, d, d]; None in the basis of the original channels."""
    ranking: Ranking
    """In the order they stay; of rotated channels where there is a rotation."""
    unshared: bool = False
    """Each head gets a copy of what heads share, see :attr:`mhacut.plan.UnitPlan.unshared`."""

    @property
    def basis(self) -> Basis:
        return "channel" if self.rotation is None else "principal"

    def plan(self, width: int) -> UnitPlan:
        """The cut to ``width`` channels per head."""
        unit = self.unit
        if width == unit.width:
            return UnitPlan.keep_all(unit.layer, unit.kind, unit.heads, unit.width)
        kept = self.ranking.kept(width).tolist()
        rows = tuple(map(tuple, kept))
        return UnitPlan(unit.layer, unit.kind, unit.width, rows, self.basis, self.unshared)


def find_candidates(
    module: nn.Module,
    unit: Unit,
    moments: UnitMoments,
    smallest: int,
    basis: BasisChoice,
    fisher: Tensor | None = None,
    positions: Positions = "auto",
    *,
    refit: bool = True,
) -> tuple[Candidate, ...]:
    """The ways to shrink ``unit`` that ``basis`` allows, the likeliest to be good first.

    Args:
        module: the layer.
        unit: of that layer.
        moments: of its channels.
        smallest: the least width anyone will ask for.
        basis: ``auto`` gives both where the algebra allows both.
        fisher: of errors of the layer's output, [out, out], to price the removal of hidden channels.
        positions: of channels in heads that share tensors; ``auto`` gives both ways.
        refit: whether the cut will be repaired; without that, channels are ranked by what goes with them.
    """
    found = []
    if unit.mixing == "rotate" and basis != "channel":
        rotation = _principal(module, unit, moments, refit)
        found.append(Candidate(unit, rotation, _in_order(unit, moments)))
    shares, by_channel = unit.sharing != "own", not found or basis == "auto"
    own = positions != "equal" and unit.sharing != "tied"
    equal = positions != "own" or unit.sharing == "tied"
    if by_channel and (not shares or own):
        ranking = _ranking(module, unit, moments, smallest, fisher, refit)
        found.append(Candidate(unit, None, ranking, shares))
    if by_channel and shares and equal and (unit.mixing == "select" or not refit):
        together = _parts(module, unit, moments).sum((0, 2))[None]
        found.append(Candidate(unit, None, Ranking(rank_parts(together).order.expand(unit.heads, -1))))
    elif by_channel and shares and equal:
        second = _second(unit, moments.every[0], refit)
        ranking = rank_shared_channels(second, effective_output_weights(module, unit), unit.heads, smallest)
        found.append(Candidate(unit, None, ranking))
    return tuple(found)


def exchanged(
    module: nn.Module, candidate: Candidate, moments: UnitMoments, width: int, fisher: Tensor | None
) -> Candidate:
    """``candidate`` with the channels it keeps at ``width`` improved by swaps; good for that width only.

    As it is, if nothing goes, if channels are not those that :func:`mhacut.linalg.selection.rank_channels`
    ranks (v and hidden channels in their own basis, each head's its own), or if they are seen in few rows, to
    which swaps would be fitted.

    Args:
        module: the layer.
        candidate: to shrink a unit of that layer.
        moments: of the unit's channels.
        width: that it will have.
        fisher: of errors of the layer's output, [out, out], float64.
    """
    unit = candidate.unit
    if not isinstance(candidate.ranking, Removal) or width == unit.width or few_rows(unit, moments):
        return candidate
    second, kept = _second(unit, moments.every[0], True), candidate.ranking.kept(width)
    kept = exchange_channels(second, effective_output_weights(module, unit), kept, fisher)
    order = candidate.ranking.order
    gone = torch.ones_like(order, dtype=torch.bool).scatter(-1, kept, False)
    places = gone.gather(-1, order).sort(dim=-1, stable=True).indices  # those kept first, else as they were
    return replace(candidate, ranking=Ranking(order.gather(-1, places)))


def few_rows(unit: Unit, moments: UnitMoments) -> bool:
    """Whether what is fitted to these images would fit no others."""
    return moments.fit[0].rows < FEW_ROWS * unit.heads * unit.width


def rotated(moments: UnitMoments, unit: Unit, rotation: Tensor | None) -> UnitMoments:
    """``moments`` as they are once :func:`mhacut.surgery.rotate.rotate` has changed the layer."""
    if rotation is None:
        return moments
    inverse = torch.linalg.inv(rotation).mT
    matrices = (rotation, inverse) if unit.kind == "qk" else (block_diagonal(inverse),)

    def turned(part: tuple[Moments, ...]) -> tuple[Moments, ...]:
        return tuple(side.transformed(matrix) for side, matrix in zip(part, matrices, strict=True))

    return UnitMoments(turned(moments.fit), turned(moments.held))


def block_diagonal(blocks: Tensor) -> Tensor:
    """[H, d, d] as one [H * d, H * d]."""
    matrix: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return matrix


def _principal(module: nn.Module, unit: Unit, moments: UnitMoments, refit: bool) -> Tensor:
    every = moments.every
    if unit.kind == "qk":
        return logit_basis(every[0].energy, every[1].energy)
    second = _second(unit, every[0], refit).view(unit.heads, unit.width, unit.heads, unit.width)
    own = torch.stack([second[head, :, head] for head in range(unit.heads)])
    columns = effective_output_weights(module, unit).view(-1, unit.heads, unit.width)
    if unit.sharing == "tied":  # one basis, of what any head gives to any reader
        columns = columns.flatten(0, 1)[:, None]
        return output_basis(own.mean(0, keepdim=True), columns).expand(unit.heads, -1, -1)
    return output_basis(own, columns)


def _in_order(unit: Unit, moments: UnitMoments) -> Ranking:
    device = moments.fit[0].total.device
    return Ranking(torch.arange(unit.width, device=device).expand(unit.heads, -1))


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
        parts = _parts(module, unit, moments)
        return rank_parts(torch.stack([parts[head, :, head] for head in range(unit.heads)]))
    if unit.kind == "qk":
        return rank_logit_channels(every[0].energy, every[1].energy, smallest)
    second = _second(unit, every[0], refit)
    return rank_channels(second, effective_output_weights(module, unit), unit.heads, smallest, fisher)


def _parts(module: nn.Module, unit: Unit, moments: UnitMoments) -> Tensor:
    """Second moment of what each channel adds, to the logits or to the output, [H, d, H, d].

    With q and k taken as independent; what is of different heads does not add up in logits.
    """
    first = moments.every[0].energy
    if unit.kind == "qk" or unit.linear:
        own = first if unit.linear else first * moments.every[1].energy
        return block_diagonal(own).view(unit.heads, unit.width, unit.heads, unit.width)
    columns = effective_output_weights(module, unit)
    gram = columns.mT @ columns
    return (gram * first).view(unit.heads, unit.width, unit.heads, unit.width)


def _second(unit: Unit, moments: Moments, refit: bool) -> Tensor:
    """What a refit gives a bias or batch norm to take up does not count."""
    return moments.covariance if unit.constants_pass and refit else moments.energy
