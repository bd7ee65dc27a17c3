"""Indicators and channel scales, trained by distillation from the dense model.

The source is "Automatic Channel Pruning for Multi-Head Attention" (arXiv 2405.20867): similarity weights,
score adjustment, initialisation by attention difference, channel scales. The paper's equations were not
available, so the formulas are our own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Unit
from mhacut.budget import format_flops
from mhacut.errors import MhacutError, option_name
from mhacut.plan import Plan, UnitKey, UnitPlan
from mhacut.pruning.allocate import fill_budget
from mhacut.pruning.calibrate import Calibration
from mhacut.pruning.distill import ADAM_BETAS, Distillation, minimise
from mhacut.pruning.job import Job
from mhacut.pruning.limits import Limits, nearest_width
from mhacut.pruning.paper.statistics import similarity_weight
from mhacut.runtime.progress import SILENT, Reporter
from mhacut.surgery.find import PrunableLayers
from mhacut.surgery.mask import temperature_factor
from mhacut.surgery.slice import cut

_DESCENT = 0.75
"""Fraction of the training steps in which the target falls from the dense FLOPs to the budget."""
THRESHOLD = 0.5
"""Channels with a score above this value are kept."""
START = 0.6
"""Mean start value of the indicators. START, THRESHOLD and the straight-through gradient follow "Pruning from
Scratch via Shared Pruning Module" (WACV 2024) of the same lab."""
_SPREAD = 0.03
"""Standard deviation of the start values about START. Deviations are clipped to 3 standard deviations."""


@dataclass(frozen=True)
class SearchStep:
    """State of the indicator training at one step."""

    step: int
    loss: float
    """Divergence from the dense model on the batch, plus the weighted cross-entropy if there are labels, in
    nats."""
    flops: float
    """FLOPs of the masked model at this step."""
    kept: Mapping[str, float] = field(default_factory=dict)
    """Fraction of channels that are kept, by kind (``qk``, ``v``, ``hidden``)."""


class _UnitState:
    """Trained indicators and channel scales of a unit."""

    def __init__(self, unit: Unit, job: Job, calibration: Calibration) -> None:
        self.unit, options = unit, job.options
        # Heads that share filters then keep the same channels, by their mean score.
        shares = unit.sharing != "own"
        self.equal = shares and (unit.sharing == "tied" or options.positions == "equal")
        self.unshared = shares and not self.equal
        statistics = calibration.statistics[unit.key]
        shape = (unit.heads, unit.width)
        weight = torch.ones(shape)
        if options.similarity:
            weight = similarity_weight(statistics.redundancy)
        difference = statistics.difference if options.init == "attention-difference" else None
        scores = initial_indicator(difference, shape, weight.double())
        self.weight = weight.float().to(job.device)
        self.indicator = nn.Parameter(scores.float().to(job.device))
        self.channel_scale = nn.Parameter(
            torch.ones(shape, device=job.device), requires_grad=options.reweight
        )

    def score(self) -> Tensor:
        """Weighted indicators, [H, d]; channels above 1/2 are kept."""
        score = self.weight * self.indicator
        return score.mean(0, keepdim=True).expand_as(score) if self.equal else score

    def plan(self, score: Tensor, width: int) -> UnitPlan:
        """Return the cut to the best ``width`` channels of each head."""
        unit = self.unit
        unshared = self.unshared and width < unit.width
        kept = top_channels(score, width)
        return UnitPlan(unit.layer, unit.kind, unit.width, kept, unshared=unshared)


def search(
    job: Job, limits: Limits, calibration: Calibration, distillation: Distillation
) -> tuple[Plan, dict[UnitKey, Tensor], tuple[SearchStep, ...]]:
    """Train indicators and channel scales.

    Return the plan, the scales by unit, and the log. The plan uses the whole budget. Scales [heads, dense
    width] exclude masks and the temperature factor.
    """
    options, budget = job.options, limits[0].most
    states = [_UnitState(unit, job, calibration) for unit in job.units]
    groups = [{"params": [state.indicator for state in states], "lr": options.lr}]
    if options.reweight:
        groups.append({"params": [state.channel_scale for state in states], "lr": options.gain_lr})
    optimiser = torch.optim.Adam(groups, betas=ADAM_BETAS)
    log: list[SearchStep] = []
    for step in range(options.steps):
        sunk = min(1.0, (step + 1) / (_DESCENT * options.steps))
        target = job.table.dense + (budget - job.table.dense) * sunk
        channel_scales, widths = _soft_scales(states, job)
        flops = job.table.flops(widths)
        loss = distillation.masked_loss(job.model, job.prunable, channel_scales)
        if not torch.isfinite(loss):
            rates = ("lr", "gain_lr") if options.reweight else ("lr",)
            smaller = " or ".join(option_name(rate, getattr(options, rate)) for rate in rates)
            raise MhacutError(
                f"the search diverged at step {step + 1}: the loss is not finite; try a smaller {smaller}"
            )
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        # Both gradients are normalised, so that the search does not depend on the magnitude of the loss.
        _add_budget_gradient(states, flops, target, options.budget_weight)
        optimiser.step()
        log.append(SearchStep(step, float(loss.detach()), float(flops.detach()), _kept(states, widths)))
        detail = f"loss {log[-1].loss:.4f}, {format_flops(log[-1].flops)}"
        job.reporter.advance(step + 1, options.steps, detail)
    channel_scales = {state.unit.key: state.channel_scale.detach().cpu() for state in states}
    return _final_plan(states, job, limits), channel_scales, tuple(log)


def _soft_scales(states: list[_UnitState], job: Job) -> tuple[dict[UnitKey, Tensor], dict[UnitKey, Tensor]]:
    channel_scales: dict[UnitKey, Tensor] = {}
    widths: dict[UnitKey, Tensor] = {}
    for state in states:
        unit, score = state.unit, state.score()
        count = float((score > THRESHOLD).sum()) / unit.heads
        width = nearest_width(count, unit.width, job.round_to)
        if job.options.score_adjustment:
            score = adjust_scores(score, width)
        factor = temperature_factor(unit, width, "channel")
        channel_scales[unit.key] = straight_through_mask(score) * state.channel_scale * factor
        # Straight through too: the width that would stay, with the gradient of the sum of indicators.
        soft = state.indicator.sum() / unit.heads
        widths[unit.key] = width + soft - soft.detach()
    return channel_scales, widths


def _kept(states: list[_UnitState], widths: Mapping[UnitKey, Tensor]) -> dict[str, float]:
    now: dict[str, float] = {}
    dense: dict[str, int] = {}
    for state in states:
        unit = state.unit
        now[unit.kind] = now.get(unit.kind, 0.0) + unit.heads * float(widths[unit.key].detach())
        dense[unit.kind] = dense.get(unit.kind, 0) + unit.heads * unit.width
    return {kind: now[kind] / dense[kind] for kind in now}


def _add_budget_gradient(states: list[_UnitState], flops: Tensor, target: float, weight: float) -> None:
    """Normalise the indicators' gradients. Above ``target`` FLOPs, add the FLOPs' normalised gradient."""
    # Of unit scale, one learning rate and one weight serve any model, loss and budget.
    indicators = [state.indicator for state in states]
    grads = [indicator.grad for indicator in indicators if indicator.grad is not None]
    _normalise(grads)
    if float(flops.detach()) > target:
        prices = [price.clone() for price in torch.autograd.grad(flops, indicators)]
        _normalise(prices)
        for indicator, price in zip(indicators, prices, strict=True):
            if indicator.grad is None:  # of a layer behind all that is preserved
                indicator.grad = torch.zeros_like(indicator)
            indicator.grad += weight * price


def _normalise(tensors: list[Tensor]) -> None:
    # By one factor for all tensors: what they are to each other stays.
    total = sum(float(tensor.double().square().sum()) for tensor in tensors)
    count = sum(tensor.numel() for tensor in tensors)
    rms = (total / max(count, 1)) ** 0.5
    if rms > 0:
        for tensor in tensors:
            tensor /= rms


def _final_plan(states: list[_UnitState], job: Job, limits: Limits) -> Plan:
    with torch.no_grad():
        scores = {state.unit.key: state.score().double().cpu() for state in states}
    ranked = {
        key: score.sort(dim=-1, descending=True).values.mean(0).tolist() for key, score in scores.items()
    }
    widths = fill_budget(ranked, job.choices, limits)
    return Plan(tuple(state.plan(scores[state.unit.key], widths[state.unit.key]) for state in states))


def initial_indicator(difference: Tensor | None, shape: tuple[int, int], weight: Tensor) -> Tensor:
    """Return start values m [H, d] with all scores ``weight * m`` above :data:`THRESHOLD`."""
    start = torch.full(shape, START, dtype=weight.dtype, device=weight.device)
    if difference is not None and shape[1] > 1:
        logs = difference.clamp_min(torch.finfo(difference.dtype).tiny).log()
        spread = logs.std(dim=-1, keepdim=True)
        z = torch.where(spread > 0, (logs - logs.mean(-1, keepdim=True)) / spread.clamp_min(1e-12), 0.0)
        start = start + _SPREAD * z.clamp(-3, 3).to(start)
    margin = 1e-3
    return start + (THRESHOLD + margin - (start * weight).amin(dim=-1, keepdim=True)).clamp_min(
        0
    ) / weight.clamp_min(1e-6)


def straight_through_mask(score: Tensor) -> Tensor:
    """Return 1 where ``score`` exceeds 1/2, else 0. The gradient is that of the identity function."""
    hard = (score > THRESHOLD).to(score.dtype)
    return hard + (score - score.detach())


def adjust_scores(score: Tensor, width: int) -> Tensor:
    """Return scores shifted per head so that exactly ``width`` channels lie above 1/2.

    The shift is 1/2 - tau_h, where tau_h is the midpoint between the width-th and the next largest score.
    Ties are broken by channel index, which may move tied scores apart slightly.
    """
    _heads, channels = score.shape
    order = score.detach().sort(dim=-1, descending=True, stable=True)
    last_kept = order.values[:, width - 1]
    first_cut = last_kept - 1 if width == channels else order.values[:, width]
    tau = (last_kept + first_cut) / 2
    adjusted = score + (THRESHOLD - tau)[:, None]
    kept = torch.zeros_like(score, dtype=torch.bool).scatter(-1, order.indices[:, :width], True)
    # Changes only scores on the wrong side: equal ones, and those that rounding put there.
    wrong = kept != (adjusted.detach() > THRESHOLD)
    side = THRESHOLD + 4 * torch.finfo(score.dtype).eps * kept.to(score.dtype)
    return torch.where(wrong, side + (adjusted - adjusted.detach()), adjusted)


def top_channels(score: Tensor, width: int) -> tuple[tuple[int, ...], ...]:
    """Return the ``width`` best channels of each head, ascending; ties go to the lower index."""
    if not torch.isfinite(score).all():
        raise ValueError("scores must be finite: NaN would rank highest")
    best = score.sort(dim=-1, descending=True, stable=True).indices[:, :width]
    return tuple(tuple(row) for row in best.sort(dim=-1).values.tolist())


def with_trained_scales(
    slim: nn.Module,
    prunable: PrunableLayers,
    distillation: Distillation,
    *,
    steps: int,
    lr: float,
    reporter: Reporter = SILENT,
) -> nn.Module:
    """Return a copy of ``slim`` with a trained scale merged into each of its channels.

    This is the paper's "reweight module to compensate for information loss". Scales of v and hidden channels
    are merged into the columns that read them, scales of qk channels into the rows of W_q.
    """
    device = next(slim.parameters()).device
    scales = {
        unit.key: nn.Parameter(torch.ones(unit.heads, unit.width, device=device)) for unit in prunable.units()
    }
    minimise(
        lambda: distillation.masked_loss(slim, prunable, scales),
        scales.values(),
        steps=steps,
        lr=lr,
        reporter=reporter,
    )
    scaled = copy.deepcopy(slim)
    everything = Plan(tuple(unit.keep_first(unit.width) for unit in prunable.units()))
    cut(scaled, everything, {key: scale.detach().cpu() for key, scale in scales.items()}, prunable)
    return scaled
