"""Search for the smallest model within a bound: a bracket of budgets that closes, then a walk below it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
_SHRINKS = 0.5
"""Fraction of the bracket that two trials must leave at most; else the next one halves it."""
_LEAST = 1e-9
"""Ratio of a loss to its bound below which it says nothing about the next budget."""
_MISSES = 3
"""Models in a row, a stride apart, that must miss the bound below the smallest one within it."""
_STRIDES = 400
"""Most strides of the walk from the highest budget down; a stride is no less than a step."""


@dataclass(frozen=True)
class Trial(Generic[T]):
    """A model cut to a budget, and how far its loss is from the bound."""

    cost: int
    """Cost of the model; not above its budget."""
    ratio: float
    """Loss relative to the bound; the model is within it at 1 or less."""
    found: T

    @property
    def passes(self) -> bool:
        return self.ratio <= 1


@dataclass(frozen=True)
class Bracket:
    """Budgets between which the smallest model within the bound lies."""

    low: int
    """Lowest budget."""
    high: int
    """Highest budget."""
    step: int
    """Difference of budgets that is worth a trial."""


def smallest_within(
    bracket: Bracket,
    attempt: Callable[[int], Trial[T]],
    expected: Callable[[int], float],
    goal: float,
) -> tuple[Trial[T] | None, Trial[T]]:
    """Return the trial of least cost within the bound, and the one of least loss, for when there is none.

    Losses are assumed to fall as budgets grow, though not steadily. Until one trial passes and one fails, the
    next budget is the one at which the expected loss, scaled to the last measurement, meets the bound. Then
    it is the one at which the logarithm of the loss, interpolated linearly between the two nearest trials,
    meets it. A bracket that hardly shrinks is halved. When passing and failing budgets are at most a step
    apart, smaller models are tried until :data:`_MISSES` in a row miss.

    Args:
        bracket: budgets to look at.
        attempt: cuts to a budget and judges.
        expected: loss that is expected at a budget, up to a factor; falls as budgets grow.
        goal: expected loss at which to begin.

    Returns:
        None as the first if no trial passes, the one at the highest budget included.
    """
    failing, passing = bracket.low - bracket.step, bracket.high + bracket.step
    best: Trial[T] | None = None
    nearest: Trial[T] | None = None
    sizes, failed = list[int](), list[tuple[int, Trial[T]]]()
    above, below = math.inf, 0.0  # ratios at the failing and at the passing budget
    while passing - failing > bracket.step:
        sizes.append(passing - failing)
        if below > _LEAST and above < math.inf:
            share = math.log(above) / (math.log(above) - math.log(below))
            budget = round(failing + share * (passing - failing))
        else:
            budget = _where(expected, goal, bracket)
        if len(sizes) > 2 and sizes[-1] > _SHRINKS * sizes[-3]:
            budget = (failing + passing) // 2
        ends = failing + bracket.step, passing - bracket.step
        budget = min(max(min(budget, ends[1]), min(ends), bracket.low), bracket.high)
        trial = attempt(budget)
        if nearest is None or trial.ratio < nearest.ratio:
            nearest = trial
        if trial.passes:
            passing, below = trial.cost, trial.ratio
            if best is None or trial.cost <= best.cost:
                best = trial
        else:
            failing, above = budget, trial.ratio
            failed.append((budget, trial))
        if trial.ratio > _LEAST and math.isfinite(trial.ratio):
            goal = expected(budget) / trial.ratio
    assert nearest is not None
    return None if best is None else _below(best, failed, bracket, attempt), nearest


def _below(
    best: Trial[T],
    failed: Sequence[tuple[int, Trial[T]]],
    bracket: Bracket,
    attempt: Callable[[int], Trial[T]],
) -> Trial[T]:
    """Walk down from ``best``; return the smallest trial within the bound.

    Args:
        best: smallest so far.
        failed: budgets that missed the bound, and their trials, which stand for budgets near them.
        bracket: budgets to look at.
        attempt: cuts to a budget and judges.
    """
    stride = max(bracket.step, bracket.high // _STRIDES)
    budget, missed = best.cost, 0
    while missed < _MISSES and budget > bracket.low:
        budget = max(budget - stride, bracket.low)
        near = (
            trial
            for high, trial in failed
            if trial.cost - stride / 2 <= budget <= high + stride / 2  # models between are this one
        )
        trial = next(near, None) or attempt(budget)
        if trial.passes:
            best, missed = trial, 0
        else:
            missed += 1
        budget = min(budget, trial.cost)
    return best


def _where(expected: Callable[[int], float], goal: float, bracket: Bracket) -> int:
    """Lowest budget, to a step, at which at most ``goal`` is expected."""
    low, high = bracket.low, bracket.high
    while high - low > bracket.step:
        middle = (low + high) // 2
        if expected(middle) <= goal:
            high = middle
        else:
            low = middle
    return high
