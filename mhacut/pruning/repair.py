"""Repair: a model and a plan in, the same model out with removed channels dead and their work taken over.

Still of the dense model's shape, so that the cut afterwards is a mere slice. Ours; the algebra is in
:mod:`mhacut.linalg.reconstruction`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Unit
from mhacut.linalg.reconstruction import LinearRefit, LogitRefit, refit_linear, refit_logits
from mhacut.options.prune import Temperature
from mhacut.plan import Plan, UnitPlan
from mhacut.pruning.calibrate import UnitMoments
from mhacut.pruning.candidates import Candidate, block_diagonal, rotated
from mhacut.surgery.find import PrunableLayers, UnitKey
from mhacut.surgery.mask import kept_channels, scale, set_gate, temperature_factor
from mhacut.surgery.output import add_constant, effective_output_weights, output_weights
from mhacut.surgery.rotate import mix, rotate


@dataclass(frozen=True)
class UnitRepair:
    """How the repair of one unit went."""

    plan: UnitPlan
    """What it keeps, and in which basis."""
    ridge: float
    """Relative; infinite where refitting did not help and was left out, or is not possible."""
    error: float
    """Squared error on held-out images over that of plainly removing the channels; of the logits for qk, of
    the layer's output otherwise."""


@torch.no_grad()
def repair(
    model: nn.Module,
    prunable: PrunableLayers,
    plan: Plan,
    moments: Mapping[UnitKey, UnitMoments],
    *,
    temperature: Temperature = "kept",
    candidates: Mapping[UnitKey, tuple[Candidate, ...]] | None = None,
) -> Mapping[UnitKey, UnitRepair]:
    """Refit ``model`` in place for ``plan``: removed channels are dead, kept ones stand in for them.

    Every layer is refitted on the dense model's activations; :mod:`mhacut.pruning.sequential` then does so on
    those of the network as cut.

    Args:
        model: the dense model, eval mode, float32.
        prunable: of ``model``.
        plan: units that keep everything are skipped.
        moments: of every unit of the plan; what is fitted, and what judges the fit.
        temperature: of the softmax, where refitting the logits does not help.
        candidates: keep the plan's widths, but shrink each unit in that one of these ways that leaves the
        least
            error on held-out images; None keeps the plan's channels.
    """
    report: dict[UnitKey, UnitRepair] = {}
    for unit_plan in plan:
        if unit_plan.keeps_all:
            continue
        unit = prunable.unit(unit_plan.key)
        module = model.get_submodule(unit.layer)
        choices: list[tuple[UnitPlan, Tensor | None]] = [(unit_plan, None)]
        if candidates is not None:
            choices = [
                (candidate.plan(unit_plan.width), candidate.rotation) for candidate in candidates[unit.key]
            ]
        seen = moments[unit.key]
        if unit.linear:
            report[unit.key] = UnitRepair(choices[0][0], float("inf"), 1.0)
            if unit.gate is None:
                scale(module, unit, kept_channels(choices[0][0]).float())
            continue
        fits = [_Fit.of(module, unit, *choice, seen, temperature) for choice in choices]
        best = min(fits, key=lambda fit: fit.refit.left)
        best.apply(module, unit)
        report[unit.key] = UnitRepair(best.plan, best.refit.ridge, best.refit.error)
    return report


def shrink(
    module: nn.Module,
    unit: Unit,
    candidate: Candidate,
    width: int,
    moments: UnitMoments,
    temperature: Temperature,
    *,
    refit: bool = True,
) -> None:
    """Make channels of one layer dead in place, for ``unit`` at ``width``; with ``refit``, repair it."""
    unit_plan = candidate.plan(width)
    kept = kept_channels(unit_plan).float()
    if unit.linear and unit.gate is not None:  # nothing to refit
        set_gate(module, unit, kept.to(next(module.parameters()).device))
    elif unit.linear:
        scale(module, unit, kept)
    elif refit:
        _Fit.of(module, unit, unit_plan, candidate.rotation, moments, temperature).apply(module, unit)
    else:
        if candidate.rotation is not None:
            rotate(module, unit, candidate.rotation)
        factor = 1.0
        if unit.kind == "qk":
            factor = temperature_factor(unit, width, temperature, candidate.basis)
        scale(module, unit, kept * factor)


@dataclass(frozen=True)
class _Fit:
    """The best refit of one unit for one choice of channels."""

    plan: UnitPlan
    rotation: Tensor | None
    refit: LinearRefit | LogitRefit

    @classmethod
    def of(
        cls,
        module: nn.Module,
        unit: Unit,
        unit_plan: UnitPlan,
        rotation: Tensor | None,
        moments: UnitMoments,
        temperature: Temperature,
    ) -> _Fit:
        seen = rotated(moments, unit, rotation)
        kept = torch.tensor(unit_plan.kept, device=seen.fit[0].total.device)
        if unit.kind == "qk":
            plain = temperature_factor(unit, unit_plan.width, temperature, unit_plan.basis)
            (query, key), (held_query, held_key) = seen.fit, seen.held
            logits = refit_logits(
                (query, key), (held_query, held_key), kept, plain, mixes=unit.mixing != "select"
            )
            return cls(unit_plan, rotation, logits)
        columns = effective_output_weights(module, unit)
        if rotation is not None:
            columns = columns @ block_diagonal(rotation).mT
        flat, constant = _flat(unit, kept), unit.constants_pass
        linear = refit_linear(seen.fit[0], seen.held[0], flat, columns, constant=constant)
        return cls(unit_plan, rotation, linear)

    def apply(self, module: nn.Module, unit: Unit) -> None:
        """Put it into the layer's weights."""
        if self.rotation is not None:
            rotate(module, unit, self.rotation)
        if isinstance(self.refit, LogitRefit):
            self._mix_queries(module, unit, self.refit)
        else:
            self._move_columns(module, unit, self.refit)
        if unit.feeds:  # a channel that is not read is not dead
            scale(module, unit, kept_channels(self.plan).float())

    def _mix_queries(self, module: nn.Module, unit: Unit, refit: LogitRefit) -> None:
        mixing = refit.mixing.new_zeros(unit.heads, unit.width, unit.width)
        for head, kept in enumerate(self.plan.kept):
            where = torch.tensor(kept, device=mixing.device)
            mixing[head, where[:, None], where] = refit.mixing[head].T
        for axis in unit.scale_axes:
            mix(module, unit, axis, mixing)

    def _move_columns(self, module: nn.Module, unit: Unit, refit: LinearRefit) -> None:
        assert unit.output_projection is not None
        kept = _flat(unit, torch.tensor(self.plan.kept, device=refit.prediction.device))
        gone = torch.ones(unit.heads * unit.width, dtype=torch.bool, device=kept.device)
        gone[kept] = False
        columns = (
            module.get_parameter(unit.output_projection.tensor)
            .detach()
            .movedim(unit.output_projection.dim, -1)
        )
        copies = (
            unit.output_projection.rows(unit.heads, unit.width).flatten(0, 1).to(kept.device)
        )  # (H * d, copies)
        lost = output_weights(module, unit).detach().double()[:, gone]
        added = (lost @ refit.prediction).to(columns.dtype)
        added = added.reshape(copies.shape[1], *columns.shape[1:-1], len(columns), -1)
        for copy, places in zip(added, copies.T, strict=True):
            columns[..., places[kept]] += copy.movedim(-2, 0)
            columns[..., places[gone]] = 0
        add_constant(module, unit, lost @ refit.constant)


def _flat(unit: Unit, kept: Tensor) -> Tensor:
    """Indices per head, [H, kept], as indices over all heads, [H * kept]."""
    heads = torch.arange(unit.heads, device=kept.device)
    return (kept + unit.width * heads[:, None]).reshape(-1)
