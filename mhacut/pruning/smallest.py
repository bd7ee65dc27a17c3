"""Search for the smallest model within a bound on its loss: a bracketed secant search, then a walk below.

The loss of a healed model falls roughly exponentially with its FLOPs, so that its logarithm is nearly a line:
the secant through the two nearest trials is taken in log space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

_SHRINKS = 0.5
"""If the last 2 trials left more than this fraction of the bracket, bisect instead of interpolating."""
_LEAST = 1e-9
"""Losses below this fraction of the bound are not used to predict the next budget."""
_MISSES = 3
"""The search ends after this number of consecutive smaller models with losses over the bound."""
_STRIDES = 400
"""At the end of the search, budgets fall in steps of the largest budget divided by this number."""


class Trial(NamedTuple):
    cost: int
    """Cost of the tried model, at most the budget that was tried."""
    ratio: float
    """Loss of the tried model divided by the bound; at most 1 if the model is within the bound."""


Search = Generator[int, Trial, None]
"""Generator that yields the next budget to try. The caller sends the result of the trial."""


def smallest_within(budgets: range, expected: Callable[[int], float], goal: float) -> Search:
    """Search for the model of least cost whose loss is within the bound.

    If no model is within the bound, the highest budget is tried too. Losses are assumed to fall as budgets
    grow, with exceptions. At first, budgets are chosen by the ``expected`` loss, scaled to the last
    measurement. Once a trial passes and a trial fails, the logarithm of the loss is interpolated linearly
    between the 2 nearest trials. If the bracket hardly shrinks, the search bisects. When passing and failing
    budgets are at most a step apart, smaller models are tried until :data:`_MISSES` trials in a row fail.
    """
    low, high, step = budgets.start, budgets.stop - 1, budgets.step
    failing, passing = low - step, high + step
    best: int | None = None
    sizes, failed = list[int](), list[tuple[int, Trial]]()
    above, below = math.inf, 0.0  # ratios at the failing and at the passing budget
    while passing - failing > step:
        sizes.append(passing - failing)
        if below > _LEAST and above < math.inf:
            # The secant of log(ratio), which is 0 at the bound.
            share = math.log(above) / (math.log(above) - math.log(below))
            budget = round(failing + share * (passing - failing))
        else:
            budget = _where(expected, goal, budgets)
        if len(sizes) > 2 and sizes[-1] > _SHRINKS * sizes[-3]:
            budget = (failing + passing) // 2
        ends = failing + step, passing - step
        budget = min(max(min(budget, ends[1]), min(ends), low), high)
        trial = yield budget
        if trial.ratio <= 1:
            passing, below = trial.cost, trial.ratio
            best = trial.cost if best is None else min(best, trial.cost)
        else:
            failing, above = budget, trial.ratio
            failed.append((budget, trial))
        if trial.ratio > _LEAST and math.isfinite(trial.ratio):
            goal = expected(budget) / trial.ratio
    if best is not None:
        yield from _below(best, failed, budgets)


def _below(best: int, failed: Sequence[tuple[int, Trial]], budgets: range) -> Search:
    stride = max(budgets.step, (budgets.stop - 1) // _STRIDES)
    budget, missed = best, 0
    while missed < _MISSES and budget > budgets.start:
        budget = max(budget - stride, budgets.start)
        near = (
            trial
            for high, trial in failed
            if trial.cost - stride / 2 <= budget <= high + stride / 2  # models between are this one
        )
        trial = next(near, None) or (yield budget)
        missed = 0 if trial.ratio <= 1 else missed + 1
        budget = min(budget, trial.cost)


def _where(expected: Callable[[int], float], goal: float, budgets: range) -> int:
    low, high = budgets.start, budgets.stop - 1
    while high - low > budgets.step:
        middle = (low + high) // 2
        if expected(middle) <= goal:
            high = middle
        else:
            low = middle
    return high
