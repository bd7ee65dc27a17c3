"""Repair: least-squares reconstruction of removed channels from kept channels, folded into the weights.

The repaired model keeps the dense shape with dead channels, so that the cut only slices. The algebra is in
:mod:`mhacut.linalg.reconstruction`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Unit
from mhacut.linalg.reconstruction import Refit, refit_linear, refit_logits
from mhacut.plan import Plan, UnitKey, UnitPlan
from mhacut.pruning.calibrate import Calibration
from mhacut.pruning.candidates import Candidate
from mhacut.pruning.job import Job
from mhacut.pruning.unit_moments import UnitMoments, block_diagonal, rotated
from mhacut.surgery.channels import add_constant, effective_output_weights, mix, output_weights, rotate
from mhacut.surgery.find import PrunableLayers
from mhacut.surgery.mask import kept_channels, scale, set_gate, temperature_factor
from mhacut.surgery.tokens import tokens_of


@dataclass(frozen=True)
class UnitRepair:
    plan: UnitPlan
    ridge: float
    """Ridge of the least-squares refit, relative to the mean variance of the kept channels. Infinite without
    a refit."""
    error: float
    """Squared error after the refit on held-out images, relative to removal without refit: error of the
    attention logits for q/k channels, else of the layer's output."""


@dataclass(frozen=True)
class ReconstructedModel:
    model: nn.Module
    plan: Plan
    channel_scales: Mapping[UnitKey, Tensor]
    """Scales of the remaining channels for :func:`mhacut.surgery.slice.cut`, by unit."""
    repairs: Mapping[UnitKey, UnitRepair]
    """Result of the least-squares refit, by unit that loses channels. Empty without repair."""


def reconstruct(
    job: Job,
    calibration: Calibration,
    plan: Plan,
    candidates: Mapping[UnitKey, tuple[Candidate, ...]] | None = None,
    channel_scales: Mapping[UnitKey, Tensor] | None = None,
) -> ReconstructedModel:
    """Return a copy of the dense model whose kept channels compensate for the channels removed by ``plan``.

    ``candidates`` are other choices of channels at the same widths: the best on held-out images is used. None
    keeps the channels of ``plan``. Trained ``channel_scales`` [heads, width] apply only if ``--repair`` is
    off.
    """
    model, prunable, options = copy.deepcopy(job.model), job.prunable, job.options
    if options.repair:
        repairs = repair(
            model, prunable, plan, calibration.moments, candidates=candidates, progress=job.reporter.advance
        )
        units = tuple(repairs[unit.key].plan if unit.key in repairs else unit for unit in plan)
        plan = Plan(units, tokens_of(model))
        scales = plan_channel_scales(prunable, plan, None, refitted=True)
        return ReconstructedModel(model, plan, scales, repairs)
    if candidates is not None:
        plan = Plan(tuple(candidates[unit.key][0].plan(unit.width) for unit in plan))
        for unit in plan:
            rotation = candidates[unit.key][0].rotation
            if rotation is not None and not unit.keeps_all:
                rotate(model.get_submodule(unit.layer), prunable.unit(unit.key), rotation)
    scales = plan_channel_scales(prunable, plan, channel_scales)
    return ReconstructedModel(model, replace(plan, tokens=tokens_of(model)), scales, {})


def plan_channel_scales(
    prunable: PrunableLayers,
    plan: Plan,
    channel_scales: Mapping[UnitKey, Tensor] | None,
    *,
    refitted: bool = False,
) -> dict[UnitKey, Tensor]:
    """Return scales [heads, dense width] for :func:`~mhacut.surgery.slice.cut`; removed channels get 0."""
    masked: dict[UnitKey, Tensor] = {}
    for unit_plan in plan:
        unit = prunable.unit(unit_plan.key)
        scale = torch.ones(unit.heads, unit.width) if channel_scales is None else channel_scales[unit.key]
        kept = torch.tensor(unit_plan.kept, device=scale.device)
        mask = torch.zeros_like(scale).scatter(-1, kept, 1.0)
        factor = 1.0 if refitted else temperature_factor(unit, unit_plan.width, unit_plan.basis)
        masked[unit.key] = mask * scale * factor
    return masked


@torch.no_grad()
def repair(
    model: nn.Module,
    prunable: PrunableLayers,
    plan: Plan,
    moments: Mapping[UnitKey, UnitMoments],
    *,
    candidates: Mapping[UnitKey, tuple[Candidate, ...]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Mapping[UnitKey, UnitRepair]:
    """Refit ``model`` in place: removed channels become 0, and kept channels compensate for them."""
    report: dict[UnitKey, UnitRepair] = {}
    # Refits use the dense model's activations. Refits on the pruned model's activations would leave healing
    # less to learn (docs/explanation/choices.md).
    for number, unit_plan in enumerate(plan, 1):
        if progress is not None:
            progress(number, len(plan.units))
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
        fits = [(*choice, _refit(module, unit, *choice, seen)) for choice in choices]
        best_plan, rotation, refit = min(fits, key=lambda fit: fit[-1].error_per_row)
        _fold(module, unit, best_plan, rotation, refit)
        report[unit.key] = UnitRepair(best_plan, refit.ridge, refit.error)
    return report


def shrink(
    module: nn.Module,
    unit: Unit,
    candidate: Candidate,
    width: int,
    moments: UnitMoments,
    *,
    refit: bool = True,
) -> None:
    """Set channels of ``unit`` to 0 in place, except ``width`` per head. ``refit`` refits kept channels."""
    unit_plan = candidate.plan(width)
    kept = kept_channels(unit_plan).float()
    if unit.linear and unit.gate is not None:  # nothing to refit
        set_gate(module, unit, kept.to(next(module.parameters()).device))
    elif unit.linear:
        scale(module, unit, kept)
    elif refit:
        best = _refit(module, unit, unit_plan, candidate.rotation, moments)
        _fold(module, unit, unit_plan, candidate.rotation, best)
    else:
        if candidate.rotation is not None:
            rotate(module, unit, candidate.rotation)
        scale(module, unit, kept * temperature_factor(unit, width, candidate.basis))


def _refit(
    module: nn.Module, unit: Unit, unit_plan: UnitPlan, rotation: Tensor | None, moments: UnitMoments
) -> Refit:
    seen = rotated(moments, unit, rotation)
    kept = torch.tensor(unit_plan.kept, device=seen.fit[0].total.device)
    if unit.kind == "qk":
        plain = temperature_factor(unit, unit_plan.width, unit_plan.basis)
        (query, key), (held_query, held_key) = seen.fit, seen.held
        mixes = unit.mixing != "select"
        return refit_logits((query, key), (held_query, held_key), kept, plain, mixes=mixes)
    columns = effective_output_weights(module, unit)
    if rotation is not None:
        columns = columns @ block_diagonal(rotation).mT
    kept = _over_all_heads(unit, kept)
    return refit_linear(seen.fit[0], seen.held[0], kept, columns, constant=unit.constants_pass)


def _fold(module: nn.Module, unit: Unit, unit_plan: UnitPlan, rotation: Tensor | None, refit: Refit) -> None:
    if rotation is not None:
        rotate(module, unit, rotation)
    if unit.kind == "qk":
        _mix_queries(module, unit, unit_plan, refit)
    else:
        _move_columns(module, unit, unit_plan, refit)
    if unit.feeds:  # other layers may read a channel that the output projection does not read
        scale(module, unit, kept_channels(unit_plan).float())


def _mix_queries(module: nn.Module, unit: Unit, unit_plan: UnitPlan, refit: Refit) -> None:
    """Fold the refit matrix C into the query weights W_q: kept rows become C^T W_q, other rows 0."""
    mixing = refit.matrix.new_zeros(unit.heads, unit.width, unit.width)  # (H, d, d)
    for head, kept in enumerate(unit_plan.kept):
        rows = torch.tensor(kept, device=mixing.device)
        mixing[head, rows[:, None], rows] = refit.matrix[head].T
    for axis in unit.scale_axes:
        mix(module, unit, axis, mixing)


def _move_columns(module: nn.Module, unit: Unit, unit_plan: UnitPlan, refit: Refit) -> None:
    projection = unit.output_projection
    assert projection is not None
    assert refit.constant is not None
    kept = _over_all_heads(unit, torch.tensor(unit_plan.kept, device=refit.matrix.device))
    gone = torch.ones(unit.heads * unit.width, dtype=torch.bool, device=kept.device)
    gone[kept] = False
    columns = module.get_parameter(projection.tensor).detach().movedim(projection.dim, -1)
    # columns: (rows, *kernel, inputs). A channel may be read at several places, with one copy for each, and
    # by a kernel at several pixels. output_weights lists all of these as rows: out = copies * kernel * rows.
    copies = projection.rows(unit.heads, unit.width).flatten(0, 1).to(kept.device)  # (H * d, copies)
    lost = output_weights(module, unit).detach().double()[:, gone]  # (out, removed)
    added = (lost @ refit.matrix).to(columns.dtype)  # (out, kept)
    added = added.reshape(copies.shape[1], *columns.shape[1:-1], len(columns), -1)
    for more, places in zip(added, copies.T, strict=True):  # more: (*kernel, rows, kept)
        columns[..., places[kept]] += more.movedim(-2, 0)
        columns[..., places[gone]] = 0
    add_constant(module, unit, lost @ refit.constant)


def _over_all_heads(unit: Unit, kept: Tensor) -> Tensor:
    """Return channel indices per head [H, kept] as indices into the channels of all heads [H * kept]."""
    heads = torch.arange(unit.heads, device=kept.device)
    return (kept + unit.width * heads[:, None]).reshape(-1)
