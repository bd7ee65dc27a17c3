"""Targets of ``mhacut prune``, and the 2 loops that meet them: budgets, and bounds on the loss.

To add a budget, write a subclass of :class:`Amount`: how much the dense model has, how much a model of any
widths has, at least nearly, and how to count it on the cut model; then name it in ``TARGETS`` of
:mod:`mhacut.commands.prune`, its units in ``KINDS`` of :mod:`mhacut.budget`, and its option in
:mod:`mhacut.options.prune`. Names of files, errors, the record, JSON, text and the report follow.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from mhacut.budget import KINDS, Budget, format_amount, format_flops
from mhacut.checkpoint.write import file_size
from mhacut.commands.prune_attempt import Attempt, TargetResult, cut_model, recover_model
from mhacut.commands.prune_inputs import PruneInputs
from mhacut.errors import BudgetError, UsageError, option_name
from mhacut.measuring.accuracy import standard_error_of_drop
from mhacut.options.prune import PruneOptions
from mhacut.plan import Plan, UnitKey
from mhacut.pruning.allocate import NEAR
from mhacut.pruning.job import Job
from mhacut.pruning.limits import Limit, Limits, lowest_flops
from mhacut.pruning.planner import Planner
from mhacut.pruning.smallest import Search, Trial, smallest_within
from mhacut.surgery.costs import count_bytes, storage_cost
from mhacut.surgery.find import classifier_size
from mhacut.surgery.flops import count_parameters

Cost = Callable[[Mapping[UnitKey, int]], int]
"""Function from the width of each unit (q/k, v or hidden channels of a layer) to an amount, such as FLOPs."""
CORRECTIONS = 3
"""Maximum number of corrected plans after the first plan, if budgets are missed or not used up."""
KL_PER_POINT = 0.025
"""KL divergence in nats at which an ImageNet ViT-Ti lost about 1 point of top-1."""
_USED = 0.93
"""A corrected plan is accepted if the cut model uses at least this fraction of the budget."""
_SPARE, _SPARE_OF_TIME = 600, 500
"""Bytes reserved in the header of a slim file for values that are measured later: 600 for accuracy and
reached targets, 500 for the conditions of latency measurements."""


class Target(ABC):
    """Base class of targets: a budget, or a bound on the loss, of 1 output file."""

    name: ClassVar[str]
    """Name of the option that sets the target."""
    limit: Limit | None = None
    """Limit on widths for the first plan. None if every plan meets the target."""
    safety: ClassVar[float] = 1.0
    """A model within this fraction of the target is expected to meet the target when measured again."""
    advice: ClassVar[str] = ""
    """Advice at the end of the error message if no model meets the target."""

    def __init__(self, inputs: PruneInputs, asked: Any) -> None:
        self.inputs, self.job, self.asked = inputs, inputs.job, asked
        self.option = option_name(self.name, asked)
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Convert the option's value to a limit, before the calibration."""

    @abstractmethod
    def measure(self, attempt: Attempt, planner: Planner) -> TargetResult: ...


def options_of_lowest(job: Job) -> str:
    """Name the user's options that raise the lowest reachable budget; return an empty text without such."""
    named: list[tuple[str, object]] = []
    if not job.merges_tokens:
        mlp = any(unit.kind == "hidden" for unit in job.units)
        named.append(("scope", "attention+mlp" if mlp else "attention"))
    if isinstance(job.options, PruneOptions) and job.options.as_ == "timm":  # the others have no such options
        named += [("round_to", job.round_to)] if job.round_to > 1 else []
        named += job.constraints
    options = [option_name(*each) for each in named]
    return f" with {', '.join(options[:-1])}{' and ' * (len(options) > 1)}{options[-1]}" if options else ""


def check_reachable(budget: Budget, dense: int, lowest: int, job: Job) -> None:
    if budget.amount(dense) >= lowest:
        return
    hint = ""
    if re.fullmatch(r"\d{1,2}|0?\.\d+", budget):  # a percentage without its sign
        percent = f"{100 * budget.value if budget.value < 1 else budget.value:g}%"
        hint = f"; did you mean {option_name(budget.resource, percent)}?"
    raise BudgetError(
        f"{option_name(budget.resource, budget)} is out of reach: the lowest is "
        f"{format_amount(lowest, budget.resource, up=True)} ({math.ceil(1000 * lowest / dense) / 10}% of "
        f"{format_amount(dense, budget.resource)}){options_of_lowest(job)}{hint}"
    )


class Targets:
    def __init__(self, inputs: PruneInputs, kinds: Sequence[type[Target]]) -> None:
        asked = [(kind, getattr(inputs.options, kind.name)) for kind in kinds]
        self.all = [kind(inputs, value) for kind, value in asked if value is not None]
        self.inputs = inputs
        budgets = [target for target in self.all if isinstance(target, Amount)]
        if budgets and all(budget.limit is None for budget in budgets):
            within = " and ".join(f"{one.text(one.dense)} are already within {one.asked}" for one in budgets)
            raise BudgetError(f"nothing to prune: the model's {within}. Set a lower budget")

    def measure(self, attempt: Attempt, planner: Planner) -> tuple[TargetResult, ...]:
        return tuple(target.measure(attempt, planner) for target in self.all)

    def corrected(self, attempt: Attempt) -> Limits | None:
        """Return tighter or wider limits for another plan. None if every budget is met and used up."""
        both = zip(self.all, attempt.reached, strict=True)
        limits = (target.next(attempt, result) for target, result in both if isinstance(target, Amount))
        corrected = {limit.resource: limit for limit in limits if limit is not None}
        if not corrected:
            return None
        # Limits of budgets that are met do not change: next to a tighter limit they mostly stay met.
        return tuple(corrected.get(limit.resource, limit) for limit in attempt.limits)

    def log(self, attempt: Attempt, conclusion: str) -> None:
        job, flops = self.inputs.job, attempt.planned.flops
        share = 100 * flops / job.table.dense
        results = ", ".join(f"{result.labels[1]} (limit {result.labels[0]})" for result in attempt.reached)
        job.reporter.log(f"{format_flops(flops)} FLOPs ({share:.1f} % of dense): {results}, {conclusion}")

    def rank(self, attempt: Attempt) -> tuple[float, ...]:
        """Return the sort key of an attempt: targets met, then met with a margin, then more FLOPs."""
        if attempt.worst_ratio > 1:
            return 0, -attempt.worst_ratio
        both = zip(self.all, attempt.reached, strict=True)
        without_margin = [result.ratio for target, result in both if result.ratio > target.safety]
        return (1, -max(without_margin)) if without_margin else (2, attempt.planned.flops)

    def missed(self, nearest: Attempt) -> BudgetError:
        both = zip(self.all, nearest.reached, strict=True)
        missed = [(target, one) for target, one in both if one.ratio > 1]
        share = 100 * nearest.planned.flops / self.inputs.job.table.dense
        has = ", ".join(f"{one.labels[1]}, limit {one.labels[0]}" for _, one in missed)
        return BudgetError(
            f"{', '.join(target.option for target, _ in missed)}: no model that was tried meets the target; "
            f"the nearest, with {share:.1f}% of the FLOPs, has {has}"
            + "".join(target.advice for target, _ in missed)
        )


class Amount(Target):
    """Budget of an amount that grows with the width of every layer, such as FLOPs or bytes."""

    aim: ClassVar[float] = 1.0
    """A plan is made for this fraction of the budget."""

    asked: Budget

    def prepare(self) -> None:
        self.dense = self.dense_amount()
        self.most = self.asked.amount(self.dense)
        cost = self.cost()
        check_reachable(self.asked, self.dense, self.lowest(cost), self.job)
        aim = math.ceil(self.aim * self.most)
        self.limit = Limit(cost, aim, self.name) if self.most < self.dense else None

    @abstractmethod
    def dense_amount(self) -> int: ...

    @abstractmethod
    def cost(self) -> Cost:
        """Return the function that predicts the amount from the width of each unit."""

    @abstractmethod
    def count(self, attempt: Attempt) -> int: ...

    def lowest(self, cost: Cost) -> int:
        return lowest_flops(self.job.allowed, cost)

    def text(self, amount: float) -> str:
        return f"{format_amount(amount, self.name)} {KINDS[self.name].noun}".rstrip()

    def measure(self, attempt: Attempt, planner: Planner) -> TargetResult:
        amount = self.count(attempt)
        labels = self.text(self.most), format_amount(amount, self.name)
        return TargetResult(self.name, self.asked, self.most, amount, labels=labels, amount=amount)

    def next(self, attempt: Attempt, reached: TargetResult) -> Limit | None:
        if self.limit is None:
            return None
        # What the cut model has beyond the prediction is taken off what was asked (a secant of slope 1).
        (limit,) = (each for each in attempt.limits if each.resource == self.name)
        corrected = attempt.planned.corrected(limit, self.limit, reached.amount)
        # The first plan may use too little of a budget that was predicted too high; so may a correction.
        unused = corrected.most >= limit.most / NEAR and (attempt.number == 1 or reached.ratio <= _USED)
        if limit.curve is not None:  # unless another limit decides
            unused = attempt.planned.cost(limit) > NEAR * limit.most and reached.ratio <= _USED
        return corrected if reached.ratio > self.safety or unused else None


class Flops(Amount):
    """Budget of FLOPs. Predicted FLOPs are exact, token merging included."""

    name = "flops"

    def dense_amount(self) -> int:
        return self.job.table.dense

    def cost(self) -> Cost:
        return self.job.table.flops

    def lowest(self, cost: Cost) -> int:
        return lowest_flops(self.job.allowed, (self.job.all_merged_costs or self.job.table).flops)

    def count(self, attempt: Attempt) -> int:
        return attempt.planned.flops

    def next(self, attempt: Attempt, reached: TargetResult) -> Limit | None:
        return None  # there is nothing to correct, merges or not


class Params(Amount):
    name = "params"

    def dense_amount(self) -> int:
        return count_parameters(self.inputs.source.model)

    def cost(self) -> Cost:
        job, copies = self.job, self.inputs.options.positions != "equal"
        return storage_cost(job.model, job.prunable, job.least_widths, None, copies=copies)

    def count(self, attempt: Attempt) -> int:
        return count_parameters(attempt.model)


class Size(Amount):
    """Budget for the bytes of the slim file, in the dtypes of the checkpoint."""

    name = "size"

    def dense_amount(self) -> int:
        return self.inputs.source.size()

    def cost(self) -> Cost:
        job, dtypes = self.job, self.inputs.dtypes
        copies = self.inputs.options.positions != "equal"
        tensors = storage_cost(job.model, job.prunable, job.least_widths, dtypes, copies=copies)
        plan = Plan(tuple(unit.keep_first(job.least_widths[unit.key]) for unit in job.units))
        curves = {key: dict.fromkeys(widths, 1 / 3) for key, widths in job.choices.items()}
        record = self.inputs.record(plan, curves, job.table.dense)
        # If the header of the file is larger, the next plan is corrected.
        header = file_size(job.model, record, dtypes) - count_bytes(job.model, dtypes) + self._spare
        return lambda widths: tensors(widths) + header

    def count(self, attempt: Attempt) -> int:
        planned, inputs = attempt.planned, self.inputs
        record = inputs.record(planned.plan, planned.curves, self.job.table.dense)
        return file_size(attempt.model, record, inputs.dtypes) + self._spare

    @property
    def _spare(self) -> int:
        return _SPARE + (0 if self.inputs.options.max_latency is None else _SPARE_OF_TIME)


class _Loss(Target):
    name: ClassVar[str]
    nats_per_unit: ClassVar[float] = 1.0
    """Expected KL divergence in nats per unit of the bound, for the first trials."""
    floor: ClassVar[float] = 0.0
    """Smallest bound that the first trials assume, in the unit of the option. A bound of 0 points would give
    0 nats."""
    format: ClassVar[str]

    def prepare(self) -> None:
        self.most = float(self.asked)
        self.lowest = lowest_flops(self.job.allowed, (self.job.all_merged_costs or self.job.table).flops)
        classes = classifier_size(self.inputs.source.model)
        if classes < 2:
            what = "one output" if classes else "no classifier"
            raise UsageError(f"{self.option}: expected a model with 2 or more classes, found {what}")
        if self.lowest >= self.job.table.dense:
            have, options = format_amount(self.job.table.dense, "flops"), options_of_lowest(self.job)
            raise BudgetError(f"nothing to prune{options}: the model already has the lowest FLOPs ({have})")

    def search(self, planner: Planner) -> Search:
        job = self.job
        # No two plans differ by less than a width step: the dearest one is what a trial is worth.
        highest = min(int(job.table.flops({})), job.table.dense - 1)  # else nothing would be cut
        dense = {key: widths[-1] for key, widths in job.allowed.items()}
        narrower = ({**dense, key: widths[-2]} for key, widths in job.allowed.items() if len(widths) > 1)
        steps = (job.table.flops(dense) - job.table.flops(widths) for widths in narrower)
        step = max(int(max(steps, default=job.table.flops(dense) // 100)), 1)
        by_curves = job.options.allocation == "curves"

        def expected(budget: int) -> float:
            limit = Limit(job.table.flops, budget)
            return planner.expected_divergence((limit,)) if by_curves else 1 - budget / job.table.dense

        budgets = range(self.lowest, highest + 1, step)
        return smallest_within(budgets, expected, self.nats_per_unit * max(self.most, self.floor))

    def reached(self, loss: float, error: float | None = None) -> TargetResult:
        asked, shown = f"{self.most:g}", self.format.format(loss)
        shown += "" if error is None else f" (standard error {error:.2f})"
        return TargetResult(self.name, asked, self.most, loss, error, labels=(asked, shown))


class MaxKL(_Loss):
    """Bound on the KL divergence of the logits from the dense model's, on held-out calibration images."""

    name, format = "max_kl", "KL {:.3g}"

    def prepare(self) -> None:
        super().prepare()
        preserve = self.inputs.options.preserve
        if preserve not in (None, "answers"):
            what = option_name("preserve", preserve)
            raise UsageError(f"{self.option} is a bound on the logits: leave out {what}")

    def measure(self, attempt: Attempt, planner: Planner) -> TargetResult:
        model = attempt.model.to(self.job.device)
        return self.reached(self.job.held_out(planner.calibration).divergence_of(model))


class MaxDrop(_Loss):
    """Bound on the lost points of top-1 accuracy, on labelled validation images."""

    name, format = "max_drop", "{:.2f} points of top-1 lost"
    nats_per_unit, floor = KL_PER_POINT, 0.1

    def prepare(self) -> None:
        super().prepare()
        validation = self.inputs.validation
        if validation.no_accuracy:
            raise UsageError(
                f"{self.option}: expected labelled images to measure accuracy on; {validation.no_accuracy}. "
                f"Without labels, {option_name('max_kl')} bounds the KL divergence"
            )
        right, chance = validation.dense_predictions().right, 1 / classifier_size(self.inputs.source.model)
        # Two standard errors above chance: below that, no drop can be told from luck.
        if right and sum(right) / len(right) <= chance + 2 * (chance * (1 - chance) / len(right)) ** 0.5:
            raise BudgetError(
                f"{self.option}: the dense model is right on {100 * sum(right) / len(right):.1f} % of "
                f"{len(right)} images, no better than chance. Check labels ({option_name('class_map')}) and "
                f"preprocessing ({option_name('mean')}, {option_name('std')})"
            )

    def measure(self, attempt: Attempt, planner: Planner) -> TargetResult:
        validation = self.inputs.validation
        predictions = attempt.predictions(validation, attempt.model)
        assert predictions is not None
        before, right = validation.dense_predictions().right, predictions.right
        drop = 100 * (sum(before) - sum(right)) / len(right)
        error = standard_error_of_drop(before, right)
        return self.reached(drop, error)


def meet_budgets(targets: Targets, planner: Planner) -> Attempt:
    """Plan, cut and measure until every budget is met and used up.

    Then recover the accuracy of the best model.
    """
    limits: Limits = tuple(target.limit for target in targets.all if target.limit is not None)
    attempt: Attempt | None = None
    best: Attempt | None = None
    for number in range(1, CORRECTIONS + 2):
        planned = planner.plan(limits)
        if attempt is not None and planned.plan == attempt.planned.plan:
            break  # no width lies between these limits and the previous ones
        attempt = cut_model(planned, limits, number, planner)
        attempt.reached = targets.measure(attempt, planner)
        best = max([attempt] if best is None else [best, attempt], key=targets.rank)
        corrected = targets.corrected(attempt)
        if corrected is None or number > CORRECTIONS:
            break
        targets.log(attempt, "planning again")
        limits = corrected
    assert best is not None
    if best.worst_ratio > 1:
        raise targets.missed(best)
    recover_model(best, targets.inputs.dtypes, planner)
    return best


def smallest_within_loss(targets: Targets, planner: Planner) -> Attempt:
    # All bounds share the search of the first bound. A trial is judged by the worst ratio of all bounds.
    search = next(target.search(planner) for target in targets.all if isinstance(target, _Loss))
    attempt: Attempt | None = None
    best: Attempt | None = None
    number, budget = 1, _next_budget(search, None)
    while budget is not None:
        limits = (Limit(planner.job.table.flops, budget),)
        planned = planner.plan(limits)
        if attempt is not None and planned.plan == attempt.planned.plan:
            attempt = replace(attempt, number=number, limits=limits)  # the same model is a trial, too
        else:
            attempt = cut_model(planned, limits, number, planner)
            recover_model(attempt, targets.inputs.dtypes, planner)  # the loss is that of the recovered model
            attempt.reached = targets.measure(attempt, planner)
        targets.log(attempt, "within the bound" if attempt.worst_ratio <= 1 else "above the bound")
        best = max([attempt] if best is None else [best, attempt], key=_rank_within_loss)
        budget = _next_budget(search, Trial(attempt.planned.flops, attempt.worst_ratio))
        number += 1
    assert best is not None
    if best.worst_ratio > 1:
        raise targets.missed(best)
    return best


def _rank_within_loss(attempt: Attempt) -> tuple[float, ...]:
    if attempt.worst_ratio > 1:
        return 0, -attempt.worst_ratio
    return 1, -attempt.planned.flops, -attempt.limits[0].most  # of 2 budgets for one model, the lower


def _next_budget(search: Search, trial: Trial | None) -> int | None:
    """Send a trial (None at the start) to the search. Return the next budget to try, or None at the end."""
    try:
        return next(search) if trial is None else search.send(trial)
    except StopIteration:
        return None
