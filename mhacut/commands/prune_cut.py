"""Stages 3 to 6 of ``mhacut prune``: plan, cut, check, recover; to budgets or within a bound on the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from mhacut.budget import format_flops
from mhacut.checkpoint.write import file_size
from mhacut.commands.prune_inputs import PruneInputs
from mhacut.commands.prune_latency import CORRECTIONS
from mhacut.commands.prune_record import slim_record
from mhacut.commands.prune_targets import Reached
from mhacut.errors import BudgetError, MhacutError, option_name
from mhacut.measuring.accuracy import Evaluation, evaluate, standard_error_of_drop
from mhacut.pruning.allocate import NEAR
from mhacut.pruning.check import check_exact, check_flops, masked_outputs
from mhacut.pruning.job import Job
from mhacut.pruning.limits import Limit, Limits, lowest_flops
from mhacut.pruning.planner import Planned, Planner
from mhacut.pruning.recover import recover
from mhacut.pruning.smallest import Bracket, Trial, smallest_within
from mhacut.runtime.progress import Reporter
from mhacut.surgery.costs import round_to_stored
from mhacut.surgery.find import PrunableLayers, classifier_size, find_prunable_layers
from mhacut.surgery.flops import count_parameters
from mhacut.surgery.slice import cut
from mhacut.surgery.tokens import with_tokens

PROBED = 4
"""Number of images on which the cut and the written model are checked."""
_ROUNDS = 1 + CORRECTIONS
"""Largest number of plans for one file with budgets of storage or time: the exact size is known only after
the cut, and the time only after a run."""
_USED = 0.93
"""Fraction of a time above which it counts as used up if tokens may be merged."""
_SURE = 0.98
"""Fraction of a time up to which a new measurement is likely to be within it too."""
_SPARE = 600
"""Bytes reserved in a file's header for results known at the end: accuracy, and the targets reached."""
_SPARE_OF_TIME = 500
"""Bytes more for a budget of time, and the conditions that it was measured under."""
_KL_PER_POINT = 0.025
"""KL divergence in nats at which a classifier has lost about one point of top-1: an ImageNet ViT-Ti."""


@dataclass(frozen=True)
class Correction:
    """Limits of the next plan, corrected by the amounts of the previous cut model."""

    plans: int
    """Number of plans so far."""
    limits: Limits


@dataclass(frozen=True)
class CutModel:
    """A model that was planned, cut, checked and recovered."""

    model: nn.Module
    layers: PrunableLayers
    """Its prunable layers."""
    planned: Planned
    flops: int
    budget: int
    """Budget of FLOPs that it was cut to."""
    correction: Correction
    """Limits of the plan that would follow if this one were too slow."""
    corrections: int
    """Number of corrections that led to its plan."""
    bounds: tuple[Reached, ...] = ()
    """Measured losses that the options bound."""
    evaluation: Evaluation | None = None
    """Accuracy, where it was judged."""


def cut_to_budget(inputs: PruneInputs, planner: Planner, after: Correction | None = None) -> CutModel:
    """Return the model cut to the limits of the job.

    Args:
        inputs: of the command.
        planner: plans the cut.
        after: limits to begin with, if earlier plans missed those of the job; by default those of the job.

    Raises:
        BudgetError: the last of the plans misses the budget of time.
        MhacutError: the cut is not as planned.
    """
    fit, plans = _cut_within(inputs, planner, after or Correction(0, inputs.storage))
    found, slim, planned, job = fit.found, fit.found.model, fit.found.planned, inputs.job
    layers = find_prunable_layers(slim)
    flops = check_flops(slim, job, planned, inputs.budget)  # 5. check
    check_exact(slim, found.masked, job.images[:PROBED])
    known = {layer.name for layer in job.prunable.layers}
    others = [layer.name for layer in layers.layers if layer.name not in known]
    learning = layers.without(others, "does not run for what is preserved")
    slim = recover(slim, learning, job, planner.calibration, planned.merged)  # 6. recover
    correction = Correction(plans, fit.amounts.corrected)
    return CutModel(slim, layers, planned, flops, inputs.budget, correction, fit.plans - 1)


@dataclass(frozen=True)
class _Cut:
    """A model that was cut."""

    model: nn.Module
    planned: Planned
    masked: Tensor
    """What the masked model of the dense shape computes for the probed images."""

    @classmethod
    def of(cls, planned: Planned, job: Job) -> _Cut:
        """Cut the model of ``planned`` in place: a copy would take as much memory as the dense model."""
        ready = planned.ready
        model = ready.model.cpu()
        masked = masked_outputs(job, ready, job.images[:PROBED])
        cut(model, ready.plan, ready.channel_scales, job.prunable)  # 4. cut
        return cls(model, planned.without_model(), masked)


@dataclass(frozen=True)
class _Amounts:
    """Exact storage and time of a cut model, compared with the limits."""

    corrected: Limits
    """Limits that the next plan would be made with."""
    missed: tuple[Limit, ...]
    """Limits that it exceeds."""
    unused: frozenset[str]
    """Resources of which it could use more."""
    share: float = 0.0
    """Share of the budget of time that it takes; 0 without one."""

    @property
    def sure(self) -> bool:
        """Whether it is likely to be within the budget of time when it is timed again."""
        return self.share <= _SURE

    @property
    def time_decides(self) -> bool:
        """Whether the budget of time is a reason for another plan."""
        return self.share > 1 or (not self.missed and (not self.sure or "max_latency" in self.unused))


@dataclass(frozen=True)
class _Fit:
    """A cut model within all limits."""

    found: _Cut
    plans: int
    """Number of plans up to this one."""
    amounts: _Amounts

    @property
    def rank(self) -> tuple[bool, float]:
        """Place among fits: the largest that is sure to fit comes first; the fastest, if none is."""
        sure = self.amounts.sure
        return sure, self.found.planned.flops if sure else -self.amounts.share


def _cut_within(inputs: PruneInputs, planner: Planner, after: Correction) -> tuple[_Fit, int]:
    """Plan and cut until the exact storage and the time are within their limits, and use them up.

    Returns:
        The cut model, and the number of plans that were made.
    """
    limits, fits, plans, reason = after.limits, list[_Fit](), after.plans, ""
    never = {limit.resource for limit in limits}  # limits that no plan kept
    while plans < _ROUNDS:
        planned = planner.plan(inputs.limits(limits))  # 3. plan
        if fits and planned.plan == fits[-1].found.planned.plan:
            break
        if reason:
            inputs.stopwatch.reporter.log(reason)
        plans += 1
        inputs.stopwatch.start("cutting")
        slim = _Cut.of(planned, inputs.job)
        del planned  # the model
        amounts = _amounts(inputs, slim, limits, first=plans == 1)
        never &= {limit.resource for limit in amounts.missed}
        if not amounts.missed:
            fits.append(_Fit(slim, plans, amounts))
            if not amounts.unused and amounts.sure:
                break
        if fits and amounts.share and plans >= CORRECTIONS:
            break  # the last plan is for a model that is slower when it is read from its file
        target = inputs.time_target
        reason = target.reason_to_go_on(_SURE) if target is not None and amounts.time_decides else ""
        limits = amounts.corrected
    if fits:
        # The first may use too little, but so may the second.
        return max(fits, key=lambda fit: fit.rank), plans
    others = [limit for limit in amounts.missed if limit.resource != "max_latency"]
    if inputs.time_target is not None and len(others) < len(amounts.missed) and never <= {"max_latency"}:
        raise inputs.time_target.missed()
    raise MhacutError(
        f"no plan was found that stores at most {', '.join(str(limit.most) for limit in others)} parameters "
        "or bytes; nothing was written. This is a gap in mhacut: please report the architecture and its "
        "arguments"
    )


def _amounts(inputs: PruneInputs, slim: _Cut, limits: Limits, *, first: bool) -> _Amounts:
    """Measure a cut model.

    Args:
        inputs: of the command, with the limits that were asked for.
        slim: the cut model.
        limits: limits that it was planned by.
        first: whether it is of the first plan.
    """
    planned = slim.planned
    corrected, missed, unused, share = [], [], set[str](), 0.0
    for asked, limit in zip(inputs.storage, limits, strict=True):
        stored, most = _stored(inputs, planned, slim.model, asked)
        missed += [asked] if stored > most else []
        if limit.resource == "max_latency":
            share = stored / most
        corrected.append(planned.corrected(limit, asked, stored))
        if limit.curve is None:
            more = first and corrected[-1].most >= asked.most / NEAR
        else:  # unless another limit decides
            more = planned.cost(limit) > NEAR * limit.most and stored <= _USED * most
        unused |= {limit.resource} if more else set()
    return _Amounts(tuple(corrected), tuple(missed), frozenset(unused), share)


def _stored(inputs: PruneInputs, planned: Planned, slim: nn.Module, limit: Limit) -> tuple[int, int]:
    """Return the parameters, bytes or nanoseconds that the cut model has, and the most that it may have."""
    if limit.resource == "max_latency":
        assert inputs.time_target is not None
        inputs.stopwatch.start("timing")
        record = slim_record(inputs, planned, inputs.job.table.dense)
        timed = inputs.time_target.time(with_tokens(slim, planned.plan.tokens), record)
        return timed.nanoseconds, timed.most
    if limit.resource == "params":
        return count_parameters(slim), limit.most
    record = slim_record(inputs, planned, inputs.job.table.dense)
    spare = _SPARE if inputs.time_target is None else _SPARE + _SPARE_OF_TIME
    return file_size(slim, record, inputs.dtypes) + spare, limit.most


def cut_within_bound(inputs: PruneInputs, planner: Planner, reporter: Reporter) -> CutModel:
    """Return the smallest model whose loss is within the bounds of the options.

    Raises:
        BudgetError: no cut model is.
    """
    job, judge = inputs.job, _Judge(inputs, planner, reporter)
    highest = min(int(job.table.flops({})), job.table.dense - 1)  # else nothing would be cut
    lowest = lowest_flops(job.allowed, (job.fewest or job.table).flops)
    bracket = Bracket(lowest, highest, _step(job))

    def attempt(budget: int) -> Trial[CutModel]:
        found = cut_to_budget(replace(inputs, budget=budget), planner)
        round_to_stored(found.model, inputs.dtypes)
        bounds, evaluation = judge(found.model)
        found.model.cpu()
        found = replace(found, bounds=bounds, evaluation=evaluation)
        ratio = max(_ratio(bound) for bound in found.bounds)
        shown = ", ".join(f"{_shown(bound)}" for bound in found.bounds)
        share = 100 * found.flops / job.table.dense
        judged = "within the bound" if ratio <= 1 else "too much"
        reporter.log(f"{format_flops(found.flops)} FLOPs ({share:.1f} %): {shown}, {judged}")
        return Trial(found.flops, ratio, found)

    best, least = smallest_within(bracket, attempt, _expected(planner), _goal(inputs))
    if best is None:
        nearest = least.found
        raise BudgetError(
            f"{', '.join(_asked(bound) for bound in nearest.bounds)}: no pruned model is within this bound; "
            f"the nearest, with {100 * nearest.flops / job.table.dense:.1f}% of the FLOPs, has "
            f"{', '.join(_shown(bound) for bound in nearest.bounds)}"
        )
    if best.cost <= lowest:
        reporter.log("this is the smallest model that these options allow")
    return best.found


def _step(job: Job) -> int:
    """FLOPs of the most expensive single width step from the dense model; 1 % of all if widths are fixed."""
    whole = {key: widths[-1] for key, widths in job.allowed.items()}
    dense = job.table.flops(whole)
    steps = [
        dense - job.table.flops({**whole, key: widths[-2]})
        for key, widths in job.allowed.items()
        if len(widths) > 1
    ]
    return max(int(max(steps, default=dense // 100)), 1)


def _expected(planner: Planner) -> Callable[[int], float]:
    """Return the predicted loss at a budget, by the curves; FLOPs where there are none."""
    job = planner.job
    if job.options.allocation != "curves":
        return lambda budget: 1 - budget / job.table.dense

    return lambda budget: planner.expected_divergence((Limit(job.table.flops, budget),))


def _goal(inputs: PruneInputs) -> float:
    """Expected loss to begin with."""
    options = inputs.options
    bounds = [] if options.max_kl is None else [options.max_kl]
    if options.max_drop is not None:
        bounds.append(_KL_PER_POINT * max(options.max_drop, 0.1))
    return min(bounds)


class _Judge:
    """Measures the losses that are bounded, on a model as it will be written."""

    def __init__(self, inputs: PruneInputs, planner: Planner, reporter: Reporter) -> None:
        """Check the dense model's accuracy if labels are used.

        Raises:
            BudgetError: it is no better than chance.
        """
        self.inputs, self.planner, self.reporter = inputs, planner, reporter
        if inputs.options.max_drop is not None:
            _check_dense(inputs)

    def __call__(self, model: nn.Module) -> tuple[tuple[Reached, ...], Evaluation | None]:
        """Return the losses, and the accuracy where it is one of them."""
        options, job, found = self.inputs.options, self.inputs.job, []
        model.to(job.device)
        if options.max_kl is not None:
            judge = job.held_out(self.planner.calibration)
            kl = judge.divergence_of(model)
            found.append(Reached("max_kl", f"{options.max_kl:g}", options.max_kl, kl))
        evaluation = None
        if options.max_drop is not None:
            before, right = self.inputs.right, list[bool]()
            assert self.inputs.validation is not None
            self.reporter.start("evaluating")
            progress = self.reporter.advance
            evaluation = evaluate(
                model, self.inputs.validation, device=job.device, progress=progress, right=right
            )
            drop = 100 * (sum(before) - sum(right)) / len(right)
            error = standard_error_of_drop(before, right)
            found.append(Reached("max_drop", f"{options.max_drop:g}", options.max_drop, drop, error))
        return tuple(found), evaluation


def _check_dense(inputs: PruneInputs) -> None:
    right = inputs.right
    chance = 1 / classifier_size(inputs.loaded.model)
    likely = chance + 2 * (chance * (1 - chance) / len(right)) ** 0.5
    share = sum(right) / len(right)
    if share <= likely:
        raise BudgetError(
            f"{option_name('max_drop', inputs.options.max_drop)}: the dense model is right on "
            f"{100 * share:.1f} % of {len(right)} images, no more than chance; check labels "
            f"({option_name('class_map')}) and preprocessing ({option_name('mean')}, {option_name('std')})"
        )


def _ratio(bound: Reached) -> float:
    """Loss relative to its bound; a bound of 0 is kept by no loss at all."""
    if bound.reached <= 0:
        return 0.0
    return bound.reached / bound.most if bound.most else float("inf")


def _asked(bound: Reached) -> str:
    return option_name(bound.name, bound.most)


def _shown(bound: Reached) -> str:
    if bound.name == "max_kl":
        return f"KL {bound.reached:.3g}"
    return f"{bound.reached:.2f} points of top-1 lost (standard error {bound.standard_error:.2f})"
