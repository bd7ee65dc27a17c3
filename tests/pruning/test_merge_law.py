"""The law of merged tokens, and the schedules found by it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mhacut.pruning.merge_law import (
    TYPICAL,
    BlockCost,
    MergeLaw,
    Tokens,
    between,
    cheapest_schedules,
    largest_merge,
    most_merged,
    trial_schedules,
)
from mhacut.surgery.grid_merging import sides_of, steps_of

VIT = Tokens(total=197, prefix=1, depth=12)


def slow_divergence(law: MergeLaw, schedule: tuple[int, ...], tokens: Tokens) -> float:
    left, total, coupling = tokens.total, 0.0, math.exp(law.coupling)
    for block, merged in enumerate(schedule):
        if merged:
            fraction = merged / (left - tokens.prefix)
            left -= merged
            early = math.exp(law.level - math.exp(law.decay) * math.sqrt(block / tokens.depth))
            term = early * fraction ** math.exp(law.power) * (tokens.total / left) ** law.crowding
            total += term ** (1 / coupling)
    return total**coupling


@pytest.mark.parametrize("tokens", [VIT, Tokens(65, 1, 6), Tokens(261, 5, 24)])
def test_trials_protect_the_prefix_and_differ(tokens: Tokens):
    trials = trial_schedules(tokens, tokens.depth - 1)
    assert len(trials) == 6
    for schedule in trials:
        left = tokens.total
        assert len(schedule) == tokens.depth
        assert schedule[-1] == 0
        for merged in schedule:
            assert 0 <= merged <= largest_merge(left, tokens.prefix)
            left -= merged


def test_the_law_is_what_it_says():
    for schedule in trial_schedules(VIT, 11):
        expected = slow_divergence(TYPICAL, schedule, VIT)
        assert TYPICAL.divergence(schedule, VIT) == pytest.approx(expected, rel=1e-12)
        counts = torch.tensor([VIT.total, *(VIT.total - merged for merged in itertools.accumulate(schedule))])
        terms = [TYPICAL.terms(b, n, m, VIT) for b, (n, m) in enumerate(itertools.pairwise(counts.double()))]
        assert float(sum(terms)) ** math.exp(TYPICAL.coupling) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_a_fit_predicts_schedules_that_were_not_measured(seed: int):
    chance = torch.Generator().manual_seed(seed)
    shifts = torch.randn(5, generator=chance) * torch.tensor([1.0, 0.2, 0.1, 0.3, 0.1])
    names = ("level", "decay", "power", "crowding", "coupling")
    true = MergeLaw(**{n: getattr(TYPICAL, n) + float(s) for n, s in zip(names, shifts, strict=True)})
    trials = trial_schedules(VIT, 11)
    noise = (0.1 * torch.randn(len(trials), generator=chance)).exp()
    measured = [true.divergence(each, VIT) * float(n) for each, n in zip(trials, noise, strict=True)]
    fitted = MergeLaw.fit(trials, measured, VIT)
    unseen = [(0, 0, 0, 4, 8, 16, 24, 28, 20, 12, 0, 0), (8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 0)]
    for schedule in unseen:
        ratio = fitted.divergence(schedule, VIT) / true.divergence(schedule, VIT)
        assert 1 / 1.35 < ratio < 1.35


def test_schedules_of_grids_are_steps_between_grids():
    tokens = Tokens(196, 0, 12, steps_of((14, 14), 14))
    trials = trial_schedules(tokens, 12)
    for schedule in (*trials, most_merged(tokens, 12), between((), most_merged(tokens, 12), 0.7, tokens)):
        assert sides_of(schedule, (14, 14), 14)[-1] < 14
    assert len(trials) >= 4
    assert sides_of(most_merged(tokens, 12), (14, 14), 14)[:6] == [14, 8, 5, 3, 2, 2]


@pytest.mark.parametrize("price", [0.0, 1e-4, 1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("tokens", [Tokens(9, 1, 3), Tokens(25, 0, 3, steps_of((5, 5), 3))])
def test_the_cheapest_schedule_is_that_of_a_search_through_all(tokens: Tokens, price: float):
    costs = [BlockCost(4, 1, 8, 9), BlockCost(4, 1, 8, 3), BlockCost(2, 0, 5)]

    def cost(schedule: tuple[int, ...]) -> float:
        left, total = tokens.total, 0.0
        for merged, block in zip(schedule, costs, strict=True):
            total += block.token * left + block.pair * left**2 + block.mlp * (left - merged)
            total += block.merge * (merged > 0)
            left -= merged
        return slow_divergence(TYPICAL, schedule, tokens) ** math.exp(-TYPICAL.coupling) + price * total

    def possible(schedule: tuple[int, ...]) -> bool:
        left = tokens.total
        for merged in schedule:
            if tokens.steps:
                least = dict(tokens.steps)[left]
                if left - merged < least or left - merged not in dict(tokens.steps):
                    return False
            elif merged > largest_merge(left, tokens.prefix):
                return False
            left -= merged
        return True

    every = [s for s in itertools.product(range(20), range(20), (0,)) if possible(s)]
    (found,) = cheapest_schedules(TYPICAL, tokens, costs, 2, [price])
    assert found[2] == 0
    assert possible(found)
    assert cost(found) == pytest.approx(min(map(cost, every)))
