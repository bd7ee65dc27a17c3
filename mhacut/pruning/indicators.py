"""The search: indicators trained with the dense model as teacher, under a FLOPs budget.

Source: "Automatic Channel Pruning for Multi-Head Attention" (arXiv 2405.20867) for the ingredients:
similarity weights, score adjustment, initialisation by attention difference, reweight channel scales. Its
equations were not available; the formulas are ours, each in one function of :mod:`mhacut.tensor`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Unit
from mhacut.linalg.indicator import (
    THRESHOLD,
    adjust_scores,
    initial_indicator,
    straight_through_mask,
    top_channels,
)
from mhacut.linalg.similarity import similarity_weight
from mhacut.options.prune import SearchOptions
from mhacut.plan import Basis, Plan, UnitPlan
from mhacut.pruning.calibrate import Calibration
from mhacut.pruning.channel_scales import ADAM_BETAS
from mhacut.pruning.distill import Distillation
from mhacut.pruning.widths import fill_budget, nearest_width, width_choices
from mhacut.surgery.costs import CostTable
from mhacut.surgery.find import PrunableLayers, UnitKey
from mhacut.surgery.mask import temperature_factor

# Share of the search in which the target sinks from dense to the budget; the rest settles there.
_DESCENT = 0.75


@dataclass(frozen=True)
class SearchStep:
    """One line of the search's log."""

    step: int
    loss: float
    """Divergence (:class:`mhacut.pruning.distill.Divergence`) from the dense model, plus, with labels, the
    weighed cross-entropy (nats), of the step's batch."""
    flops: float
    """Of the masked model at this step."""
    kept: Mapping[str, float] = field(default_factory=dict)
    """Share of all channels of a kind (``qk``, ``v``, ``hidden``) that stay at this step."""


@dataclass(frozen=True)
class SearchResult:
    """What a search found."""

    plan: Plan
    channel_scales: Mapping[UnitKey, Tensor]
    """[heads, dense width] per unit, as trained beside the indicators; without masks and temperature."""
    log: tuple[SearchStep, ...]


class _UnitState:
    """Indicator and channel scale of one unit while they are trained."""

    def __init__(
        self,
        unit: Unit,
        calibration: Calibration,
        options: SearchOptions,
        device: torch.device,
        start: Tensor | None,
        basis: Basis,
    ) -> None:
        self.unit = unit
        self.basis = basis
        # Heads that share filters then keep the same channels, by their mean score.
        self.equal = unit.sharing != "own" and (unit.sharing == "tied" or options.positions == "equal")
        self.unshared = unit.sharing != "own" and not self.equal
        statistics = calibration.statistics[unit.key]
        shape = (unit.heads, unit.width)
        weight = similarity_weight(statistics.redundancy) if options.similarity else torch.ones(shape)
        difference = statistics.difference if options.init == "attention-difference" else None
        if start is None:
            start = initial_indicator(difference, shape, weight.double())
        else:
            weight = torch.ones(shape)
        self.weight = weight.float().to(device)
        self.indicator = nn.Parameter(start.float().to(device))
        self.channel_scale = nn.Parameter(torch.ones(shape, device=device), requires_grad=options.reweight)

    def score(self) -> Tensor:
        """[H, d]."""
        score = self.weight * self.indicator
        return score.mean(0, keepdim=True).expand_as(score) if self.equal else score

    def plan(self, score: Tensor, width: int) -> UnitPlan:
        """The best ``width`` channels of each head."""
        unit = self.unit
        unshared = self.unshared and width < unit.width
        kept = top_channels(score, width)
        return UnitPlan(unit.layer, unit.kind, unit.width, kept, unshared=unshared)


def search(
    model: nn.Module,
    prunable: PrunableLayers,
    units: tuple[Unit, ...],
    table: CostTable,
    calibration: Calibration,
    distillation: Distillation,
    *,
    budget: int,
    round_to: int,
    options: SearchOptions,
    start: Mapping[UnitKey, Tensor] | None = None,
    rotated: Collection[UnitKey] = (),
    progress: Callable[[int, int, SearchStep], None] | None = None,
) -> SearchResult:
    """The plan for ``model`` under ``budget``, found by training indicators, and channel scales beside them.

    The task's gradient and the budget's are each brought to unit scale before they are added, so that the
    search does not depend on the magnitude of the loss; the target sinks from dense to ``budget`` over the
    first part of the search, and the final plan is filled up to the budget.

    Args:
        model: dense, eval mode, float32, on the device to search on; its tensors are left as they are.
        prunable: of ``model``.
        units: those that may be cut.
        table: costs of ``model``.
        calibration: of ``model``.
        distillation: what the masked model is taught.
        budget: FLOPs; reachable (see :func:`mhacut.pruning.widths.lowest_flops`).
        round_to: widths are multiples of it, or the dense width.
        options: see :class:`SearchOptions`.
        start: scores to start from, [H, d] per unit, kept where above 1/2, instead of ``options.init``; the
            target is then the budget from the first step on.
        rotated: units whose channels are principal ones in ``model``.
        progress: called after every step with (step, steps, its log line).
    """
    device = next(model.parameters()).device
    states = [
        _UnitState(
            unit,
            calibration,
            options,
            device,
            None if start is None else start[unit.key],
            "principal" if unit.key in rotated else "channel",
        )
        for unit in units
    ]
    groups = [{"params": [state.indicator for state in states], "lr": options.lr}]
    if options.reweight:
        groups.append({"params": [state.channel_scale for state in states], "lr": options.gain_lr})
    optimiser = torch.optim.Adam(groups, betas=ADAM_BETAS)
    log: list[SearchStep] = []
    for step in range(options.steps):
        sunk = 1.0 if start is not None else min(1.0, (step + 1) / (_DESCENT * options.steps))
        target = table.dense + (budget - table.dense) * sunk
        channel_scales, widths = _soft_gains(states, round_to, options)
        flops = table.flops(widths)
        loss = distillation.loss(model, prunable, channel_scales)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        _add_budget_gradient(states, flops, target, options.budget_weight)
        optimiser.step()
        log.append(SearchStep(step, float(loss.detach()), float(flops.detach()), _kept(states, widths)))
        if progress is not None:
            progress(step + 1, options.steps, log[-1])
    channel_scales = {state.unit.key: state.channel_scale.detach().cpu() for state in states}
    return SearchResult(_final_plan(states, table, budget, round_to), channel_scales, tuple(log))


def _soft_gains(
    states: list[_UnitState], round_to: int, options: SearchOptions
) -> tuple[dict[UnitKey, Tensor], dict[UnitKey, Tensor]]:
    """Masks times scales at the present indicators, and the widths; both differentiable straight through."""
    channel_scales: dict[UnitKey, Tensor] = {}
    widths: dict[UnitKey, Tensor] = {}
    for state in states:
        unit, score = state.unit, state.score()
        count = float((score > THRESHOLD).sum()) / unit.heads
        width = nearest_width(count, unit.width, round_to)
        if options.score_adjustment:
            score = adjust_scores(score, width)
        factor = temperature_factor(unit, width, options.temperature, state.basis)
        channel_scales[unit.key] = straight_through_mask(score) * state.channel_scale * factor
        soft = state.indicator.sum() / unit.heads
        widths[unit.key] = width + soft - soft.detach()
    return channel_scales, widths


def _kept(states: list[_UnitState], widths: Mapping[UnitKey, Tensor]) -> dict[str, float]:
    """Share of all channels of each kind that stay."""
    now: dict[str, float] = {}
    dense: dict[str, int] = {}
    for state in states:
        unit = state.unit
        now[unit.kind] = now.get(unit.kind, 0.0) + unit.heads * float(widths[unit.key].detach())
        dense[unit.kind] = dense.get(unit.kind, 0) + unit.heads * unit.width
    return {kind: now[kind] / dense[kind] for kind in now}


def _add_budget_gradient(states: list[_UnitState], flops: Tensor, target: float, weight: float) -> None:
    """Bring the indicators' gradients to unit scale; above ``target``, add the budget's, likewise scaled."""
    indicators = [state.indicator for state in states]
    grads = [indicator.grad for indicator in indicators if indicator.grad is not None]
    _normalise(grads)
    if float(flops.detach()) > target:
        prices = [price.clone() for price in torch.autograd.grad(flops, indicators)]
        _normalise(prices)
        for indicator, price in zip(indicators, prices, strict=True):
            assert indicator.grad is not None
            indicator.grad += weight * price


def _normalise(tensors: list[Tensor]) -> None:
    total = sum(float(tensor.double().square().sum()) for tensor in tensors)
    count = sum(tensor.numel() for tensor in tensors)
    rms = (total / max(count, 1)) ** 0.5
    if rms > 0:
        for tensor in tensors:
            tensor /= rms


def _final_plan(states: list[_UnitState], table: CostTable, budget: int, round_to: int) -> Plan:
    """The plan that the indicators stand for, filled up to the budget."""
    with torch.no_grad():
        scores = {state.unit.key: state.score().double().cpu() for state in states}
    ranked = {
        key: score.sort(dim=-1, descending=True).values.mean(0).tolist() for key, score in scores.items()
    }
    choices = {state.unit.key: width_choices(state.unit.width, round_to) for state in states}
    widths = fill_budget(ranked, choices, table.flops, budget)
    return Plan(tuple(state.plan(scores[state.unit.key], widths[state.unit.key]) for state in states))
