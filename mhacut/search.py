"""The search: indicators and reweight gains trained with the dense model as teacher, under a FLOPs budget.

Source: "Automatic Channel Pruning for Multi-Head Attention" (arXiv 2405.20867) for the four ingredients:
similarity weights, score adjustment, initialisation by attention difference, reweight gains. Its equations
were not available; the formulas are ours, each in one function of :mod:`mhacut.tensor`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhacut.adapters.base import Unit
from mhacut.calibration import Calibration
from mhacut.cost import CostTable
from mhacut.options import SearchOptions, Temperature
from mhacut.plan import Plan, UnitPlan
from mhacut.surgery import Anatomy, UnitKey, masked_tensors
from mhacut.tensor.indicator import (
    THRESHOLD,
    adjust_scores,
    initial_indicator,
    straight_through_mask,
    top_channels,
)
from mhacut.tensor.similarity import similarity_weight
from mhacut.widths import fill_budget, nearest_width, width_choices


@dataclass(frozen=True)
class SearchStep:
    """One line of the search's log."""

    step: int
    loss: float
    """Distillation loss (plus cross-entropy) of the step's batch."""
    flops: float
    """Of the masked model at this step."""


@dataclass(frozen=True)
class SearchResult:
    plan: Plan
    gains: Mapping[UnitKey, Tensor]
    """[heads, dense width] per unit, for :func:`mhacut.surgery.cut`; relative to the dense temperature."""
    log: tuple[SearchStep, ...]


class Divergence:
    """Distance of the slim model's outputs from the teacher's; a scalar, 0 when equal.

    KL(teacher || slim) in nats for classifiers; for models without one, squared error of the features
    relative to their variance.
    """

    def __init__(self, classifier: bool) -> None:
        self.classifier = classifier

    def __call__(self, outputs: Tensor, teacher: Tensor) -> Tensor:
        if self.classifier:
            return F.kl_div(
                outputs.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"
            )
        return (outputs - teacher).square().mean() / teacher.var().clamp_min(1e-12)


class _UnitState:
    """Indicator and gain of one unit while they are trained."""

    def __init__(
        self, unit: Unit, calibration: Calibration, options: SearchOptions, device: torch.device
    ) -> None:
        self.unit = unit
        statistics = calibration.statistics[unit.key]
        shape = (unit.heads, unit.width)
        weight = similarity_weight(statistics.redundancy) if options.similarity else torch.ones(shape)
        difference = statistics.difference if options.init == "attention-difference" else None
        start = initial_indicator(difference, shape, weight.double())
        self.weight = weight.float().to(device)
        self.indicator = nn.Parameter(start.float().to(device))
        self.gain = nn.Parameter(torch.ones(shape, device=device), requires_grad=options.reweight)

    def score(self) -> Tensor:
        """[H, d]."""
        return self.weight * self.indicator

    def temperature(self, width: float, choice: Temperature) -> float:
        """Factor on the logits of the masked dense model."""
        if choice == "dense" or not self.unit.softmax_scaled:
            return 1.0
        return float((self.unit.width / width) ** 0.5)


def search(
    model: nn.Module,
    anatomy: Anatomy,
    units: tuple[Unit, ...],
    table: CostTable,
    calibration: Calibration,
    images: Tensor,
    labels: Tensor | None,
    *,
    budget: int,
    round_to: int,
    options: SearchOptions,
    classifier: bool = True,
    amp: bool = False,
    progress: Callable[[int, int, SearchStep], None] | None = None,
) -> SearchResult:
    """The plan and gains for ``model`` under ``budget``, found by training indicators.

    The task's gradient and the budget's are each brought to unit scale before they are added, so that the
    search does not depend on the magnitude of the loss; the target falls from dense to ``budget`` over the
    first part of the search, and the final plan is filled up to the budget.

    Args:
        model: dense, eval mode, float32, on the device to search on; its tensors are left as they are.
        anatomy: of ``model``.
        units: those that may be cut.
        table: costs of ``model``.
        calibration: of ``model`` on ``images``.
        images: [n, C, H, W], normalised.
        labels: [n], or None for distillation only.
        budget: FLOPs; reachable (see :func:`mhacut.widths.lowest_flops`).
        round_to: widths are multiples of it, or the dense width.
        options: see :class:`SearchOptions`.
        classifier: whether outputs are class logits.
        amp: bfloat16 autocast.
        progress: called after every step with (step, steps, its log line).
    """
    device = next(model.parameters()).device
    states = [_UnitState(unit, calibration, options, device) for unit in units]
    optimiser = torch.optim.Adam(
        [
            {"params": [state.indicator for state in states], "lr": options.lr},
            {"params": [state.gain for state in states if state.gain.requires_grad], "lr": options.gain_lr},
        ],
        betas=(0.9, 0.99),
    )
    divergence = Divergence(classifier)
    batches = _batches(len(images), options.batch_size, options.seed)
    search_steps = options.steps - int(options.steps * 0.4) if options.reweight else options.steps
    log: list[SearchStep] = []
    plan: Plan | None = None
    frozen = _frozen(model)

    for step in range(options.steps):
        if step == search_steps:
            plan = _final_plan(states, table, budget, round_to)
        chosen = next(batches)
        if plan is None:
            target = table.dense + (budget - table.dense) * min(1.0, (step + 1) / (0.75 * search_steps))
            gains, flops = _soft_gains(states, table, round_to, options)
        else:
            target = float("inf")
            gains = _plan_gains(states, plan, options)
            flops = torch.tensor(float(table.flops(plan.widths())))
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            tensors = {**frozen, **masked_tensors(model, anatomy, gains)}
            outputs = torch.func.functional_call(model, tensors, (images[chosen].to(device),))
        loss = divergence(outputs.float(), calibration.teacher[chosen].to(device))
        if labels is not None and options.label_weight > 0:
            loss = loss + options.label_weight * F.cross_entropy(outputs.float(), labels[chosen].to(device))
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        if plan is None:
            _add_budget_gradient(states, flops, target, options.budget_weight)
        optimiser.step()
        log.append(SearchStep(step, float(loss.detach()), float(flops.detach())))
        if progress is not None:
            progress(step + 1, options.steps, log[-1])

    if plan is None:
        plan = _final_plan(states, table, budget, round_to)
    with torch.no_grad():
        gains = {key: gain.detach().cpu() for key, gain in _plan_gains(states, plan, options).items()}
    return SearchResult(plan, gains, tuple(log))


def _frozen(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters outside the autograd graph: only indicators and gains learn."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless shuffled index batches, every image once per round."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < size:
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        yield left[:size]
        left = left[size:]


def _soft_gains(
    states: list[_UnitState], table: CostTable, round_to: int, options: SearchOptions
) -> tuple[dict[UnitKey, Tensor], Tensor]:
    """Masks times gains at the present indicators, and their FLOPs; both differentiable straight through."""
    gains: dict[UnitKey, Tensor] = {}
    widths: dict[UnitKey, Tensor] = {}
    for state in states:
        score = state.score()
        count = float((score > THRESHOLD).sum()) / state.unit.heads
        width = nearest_width(count, state.unit.width, round_to)
        if options.score_adjustment:
            score = adjust_scores(score, width)
        mask = straight_through_mask(score)
        gains[state.unit.key] = mask * state.gain * state.temperature(width, options.temperature)
        soft = state.indicator.sum() / state.unit.heads
        widths[state.unit.key] = width + soft - soft.detach()
    return gains, table.flops(widths)


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
    return Plan(
        tuple(
            UnitPlan(key[0], key[1], state.unit.width, top_channels(scores[key], widths[key]))
            for state in states
            for key in (state.unit.key,)
        )
    )


def _plan_gains(states: list[_UnitState], plan: Plan, options: SearchOptions) -> dict[UnitKey, Tensor]:
    by_key = {unit_plan.key: unit_plan for unit_plan in plan}
    gains: dict[UnitKey, Tensor] = {}
    for state in states:
        unit_plan = by_key[state.unit.key]
        kept = torch.tensor(unit_plan.kept, device=state.gain.device)
        mask = torch.zeros_like(state.gain).scatter(-1, kept, 1.0)
        gains[state.unit.key] = mask * state.gain * state.temperature(unit_plan.width, options.temperature)
    return gains
