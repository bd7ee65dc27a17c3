"""A law for the divergence caused by token merging, and schedules of least divergence.

A schedule is the number of tokens that each block merges. Errors of merges do not add up: early merges
replace later ones, and merges cost more when few tokens are left. The law models this with 5 parameters,
fitted to a few measured schedules. On a ViT-Ti it deviates from 28 measured schedules (KL .0006 to .6) by a
factor of 1.23 (standard deviation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Schedule = tuple[int, ...]
"""Number of tokens that each block merges, by block index."""

_DEVIATIONS = (2.0, 0.4, 0.2, 0.5, 0.2)
"""Prior standard deviation of each parameter of the law around :data:`TYPICAL`."""
_NOISE = 0.2
"""Assumed standard deviation of the logarithm of a measured divergence."""
MIN_KL = 1e-6
"""Smallest divergence in nats that the fit distinguishes. Smaller measurements are raised to this value."""
_STATES = 100
"""Number of token counts that the dynamic programme distinguishes."""


class Tokens(NamedTuple):
    total: int
    """Number of tokens in the first block."""
    prefix: int
    """Number of first tokens that are never merged (class token, registers)."""
    depth: int
    steps: tuple[tuple[int, int], ...] = ()
    """For merges that leave a smaller grid: the possible numbers of tokens, descending, each with the least
    number that 1 block leaves. Empty: any number, and 1 block leaves at least half."""


class MergeLaw(NamedTuple):
    """Predict the divergence of a model with merged tokens from the schedule.

    Block i merges the fraction f_i of its tokens and leaves n_i of N tokens. The block contributes
    ``c_i = exp(level - decay * sqrt(i / depth)) * f_i ** power * (N / n_i) ** crowding``.
    The divergence is ``sum(c_i ** (1 / g)) ** g`` with ``g = coupling``. ``decay``, ``power`` and
    ``coupling`` are stored as logarithms.
    """

    level: float
    decay: float
    power: float
    crowding: float
    coupling: float

    def terms(self, block: int, before: Tensor, after: Tensor, tokens: Tokens) -> Tensor:
        return _terms(torch.tensor(self, dtype=torch.float64), block, before, after, tokens)

    def divergence(self, schedule: Schedule, tokens: Tokens) -> float:
        return float(_divergences(torch.tensor(self, dtype=torch.float64), [schedule], tokens)[0])

    @classmethod
    def fit(cls, schedules: Sequence[Schedule], measured: Sequence[float], tokens: Tokens) -> MergeLaw:
        """Fit the law to ``measured`` divergences in nats, with a prior about :data:`TYPICAL`."""
        if not schedules:
            return TYPICAL
        typical = torch.tensor(TYPICAL, dtype=torch.float64)
        deviations = torch.tensor(_DEVIATIONS, dtype=torch.float64)
        target = torch.tensor(measured, dtype=torch.float64).clamp_min(MIN_KL).log()
        # Least squares of logarithms with a normal prior about TYPICAL: with six trials for five numbers, the
        # prior decides what they leave open.
        offsets = torch.zeros(len(typical), dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([offsets], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimiser.zero_grad()
            predicted = _divergences(typical + deviations * offsets, schedules, tokens).clamp_min(1e-30).log()
            value = ((predicted - target) / _NOISE).square().sum() + offsets.square().sum()
            torch.autograd.backward(value)
            return value

        optimiser.step(loss)
        return cls(*(typical + deviations * offsets.detach()).tolist())


TYPICAL = MergeLaw(level=1.4, decay=math.log(8.7), power=0.54, crowding=1.6, coupling=0.16)
"""Law of an ImageNet ViT-Ti with 197 tokens, used as start and prior mean of the fit."""


def _terms(numbers: Tensor, block: int, before: Tensor, after: Tensor, tokens: Tokens) -> Tensor:
    level, decay, power, crowding, coupling = numbers
    fraction = ((before - after) / (before - tokens.prefix).clamp_min(1)).clamp_min(1e-12)
    # In logarithms, since a term is a power of 1 / coupling, which may be far beyond all numbers.
    logarithm = (
        level
        - decay.exp() * math.sqrt(block / tokens.depth)
        + power.exp() * fraction.log()
        + crowding * (tokens.total / after).log()
    )
    term = (logarithm / coupling.exp()).exp()
    return torch.where(after < before, term, torch.zeros_like(term))


def _divergences(numbers: Tensor, schedules: Sequence[Schedule], tokens: Tokens) -> Tensor:
    merged = torch.tensor(schedules, dtype=torch.float64)
    after = tokens.total - merged.cumsum(1)
    before = after + merged
    terms = [
        _terms(numbers, block, before[:, block], after[:, block], tokens) for block in range(merged.shape[1])
    ]
    return torch.stack(terms).sum(0).clamp_min(1e-30) ** numbers[-1].exp()


def largest_merge(count: int, prefix: int) -> int:
    """Return the maximum number of tokens that a block can merge: half of the unprotected tokens."""
    return max(count - prefix, 0) // 2


def trial_schedules(tokens: Tokens, last: int) -> list[Schedule]:
    """Return schedules to measure: early and late merges, many small and few large merges."""
    place = [block / max(last - 1, 1) for block in range(last)]
    shapes = {
        0.04: ([1.0] * last, [2 * x for x in place]),
        0.08: ([1.0] * last, [2 * x for x in place], [float(x >= 0.25) for x in place]),
        0.32: ([float(block % 3 == 2) for block in range(last)],),
    }
    scale = 12 / max(last, 1)  # so that a deep model does not run out of tokens
    schedules = [
        _schedule([scale * share * weight for weight in shape], tokens)
        for share, all_shapes in shapes.items()
        for shape in all_shapes
    ]
    return [schedule for schedule in dict.fromkeys(schedules) if any(schedule)]


def most_merged(tokens: Tokens, last: int) -> Schedule:
    return _schedule([1.0] * last, tokens)


def between(few: Schedule, many: Schedule, part: float, tokens: Tokens) -> Schedule:
    """Return a mixture of the schedules ``few`` and ``many``. ``few`` has weight ``part``."""
    both = zip(few or [0] * tokens.depth, many, strict=True)
    mixed = _schedule([(part * a + (1 - part) * b) / tokens.total for a, b in both], tokens)
    return mixed if any(mixed) else ()


def _schedule(fractions: Sequence[float], tokens: Tokens) -> Schedule:
    count, merged = tokens.total, []
    aim, least = float(count), dict(tokens.steps)
    for fraction in fractions if least else ():
        # Steps between grids are large: what a block merges too few or too many, the next blocks make up for.
        aim -= fraction * tokens.total
        left = min((n for n in least if least[count] <= n <= count), key=lambda n: abs(n - aim))
        merged.append(count - left)
        count = left
    for fraction in () if least else fractions:
        merged.append(min(round(fraction * tokens.total), largest_merge(count, tokens.prefix)))
        count -= merged[-1]
    return (*merged, *(0,) * (tokens.depth - len(merged)))


class BlockCost(NamedTuple):
    """FLOPs of a block with n tokens before and m after merging: ``token * n + pair * n * n + mlp * m``."""

    token: float
    pair: float
    mlp: float
    merge: float = 0.0
    """FLOPs that take as long as token merging in a block, for any number of merged tokens."""


def cheapest_schedules(
    law: MergeLaw, tokens: Tokens, costs: Sequence[BlockCost], last: int, prices: Sequence[float]
) -> list[Schedule]:
    """Return the distinct schedules that minimise ``sum(law.terms) + price * FLOPs`` for the ``prices``.

    The minimum is exact for numbers of tokens in steps of 1/100 of all tokens (dynamic programming).
    """
    # States of the dynamic programme are the numbers of tokens left; the price of FLOPs stands for a budget.
    step = max(1, round(tokens.total / _STATES))
    fewest = min(max(tokens.prefix, 1), tokens.total - 1)
    counts = torch.arange(tokens.total, fewest, -step, dtype=torch.float64)
    if tokens.steps:
        counts = torch.tensor([count for count, _ in tokens.steps], dtype=torch.float64)
    before, after = counts[:, None], counts[None, :]
    most = ((before - tokens.prefix).clamp_min(0) / 2).floor()
    if tokens.steps:
        most = torch.tensor([[count - least] for count, least in tokens.steps], dtype=torch.float64)
    # Matching pairs tokens of one half with tokens of the other, so that at most half can go.
    allowed = (after <= before) & (before - after <= most)
    terms = [law.terms(block, before, after, tokens) for block in range(last)]
    schedules = []
    for price in prices:
        total = torch.full_like(counts, math.inf)
        total[0] = 0.0
        came_from = []
        for block, cost in enumerate(costs):
            merges = allowed if block < last else torch.eye(len(counts), dtype=torch.bool)
            flops = cost.token * before + cost.pair * before * before + cost.mlp * after
            flops = flops + cost.merge * (after < before)
            step_cost = price * flops + (terms[block] if block < last else 0.0)
            # Shortest path: for each number of tokens left, the best number before this block.
            total, source = (total[:, None] + step_cost.masked_fill(~merges, math.inf)).min(0)
            came_from.append(source)
        schedules.append(_traced(came_from, counts, int(total.argmin())))
    return list(dict.fromkeys(schedules))


def _traced(came_from: Sequence[Tensor], counts: Tensor, state: int) -> Schedule:
    merged: list[int] = []
    for source in reversed(came_from):
        earlier = int(source[state])
        merged.append(int(counts[earlier] - counts[state]))
        state = earlier
    return tuple(reversed(merged))
