"""Allocation against every plan there is, on problems small enough to list them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhacut.pruning.allocate import NEAR, TIE, cheapest_widths, total_error, uniform_widths
from mhacut.pruning.limits import Limit, width_choices

LAYERS = [
    [("v",)],
    [("qk", "v")],
    [("qk", "v"), ("hidden",)],
    [("qk", "v"), ("qk", "v")],
    [("v",), ("hidden",)],
]


class Problem:
    def __init__(self, keys, choices, curves, price, fixed):
        self.keys, self.choices, self.curves = keys, choices, curves
        self.price, self.fixed = price, fixed

    @classmethod
    def draw(cls, data, fixed):
        layers = data.draw(st.sampled_from(LAYERS))
        keys, choices = [], {}
        for layer, kinds in enumerate(layers):
            step = data.draw(st.integers(1, 2))
            width = data.draw(st.integers(step + 1, 4 * step + 1))
            for kind in kinds:
                key = (f"layer{layer}", kind)
                keys.append(key)
                choices[key] = width_choices(width, step)
        curves = {}
        for key in keys:
            count = len(choices[key])
            # Savings per channel fall from step to step.
            rates = sorted(data.draw(st.lists(st.floats(0.01, 10), min_size=count, max_size=count)))
            curve, error = {}, 0.0
            for narrow, wide, rate in reversed(
                list(zip(choices[key], choices[key][1:], rates[::-1], strict=False))
            ):
                curve[wide] = error
                error += rate * (wide - narrow)
            curve[choices[key][0]] = error
            curves[key] = dict(sorted(curve.items()))
        price = {key: data.draw(st.integers(1, 9)) for key in keys}
        return cls(keys, choices, curves, price, fixed)

    def flops(self, widths):
        return self.fixed + sum(self.price[key] * widths[key] for key in self.keys)

    def error(self, widths):
        return sum(self.curves[key][widths[key]] for key in self.keys)

    def every(self):
        for widths in itertools.product(*(self.choices[key] for key in self.keys)):
            yield dict(zip(self.keys, widths, strict=True))

    def budget(self, data):
        least, most = (self.flops({key: self.choices[key][end] for key in self.keys}) for end in (0, -1))
        return data.draw(st.integers(least, most))

    def dearest_step(self):
        return max(
            curve[narrow] - curve[wide]
            for curve in self.curves.values()
            for narrow, wide in itertools.pairwise(curve)
        )

    def solve(self, budget):
        return cheapest_widths(self.curves, self.choices, [Limit(self.flops, budget)])


@given(data=st.data())
def test_a_budget_that_steps_fit_badly_is_met_and_used_as_well_as_it_can_be(data):
    problem = Problem.draw(data, fixed=5)
    budget = problem.budget(data)
    found = problem.solve(budget)
    fitting = [plan for plan in problem.every() if problem.flops(plan) <= budget]
    fullest = max(problem.flops(plan) for plan in fitting)
    assert problem.flops(found) <= budget
    assert problem.flops(found) >= min(fullest, NEAR * budget) - 1e-9
    # Among plans that use the budget it is the best, but for the one step.
    enough = [plan for plan in fitting if problem.flops(plan) >= min(fullest, NEAR * budget)]
    best = max(
        min(problem.error(plan) for plan in enough),
        min(problem.error(plan) for plan in fitting) + problem.dearest_step(),
    )
    assert problem.error(found) <= (1 + TIE) * best + 1e-9


def test_channels_are_bought_by_the_error_they_save_per_flop():
    # Each dear channel saves more than a cheap one, but ten cheap ones cost as much and save more.
    choices = {("a", "v"): tuple(range(1, 12)), ("b", "hidden"): (1, 2, 3)}
    curves = {
        ("a", "v"): {width: 11.0 - width for width in choices["a", "v"]},
        ("b", "hidden"): {width: 3 * (3.0 - width) for width in choices["b", "hidden"]},
    }
    price = {("a", "v"): 1, ("b", "hidden"): 10}

    def flops(widths):
        return sum(price[key] * width for key, width in widths.items())

    limit = Limit(flops, flops({("a", "v"): 11, ("b", "hidden"): 1}))
    for close_gap in (False, True):
        found = cheapest_widths(curves, choices, [limit], close_gap=close_gap)
        assert found == {("a", "v"): 11, ("b", "hidden"): 1}


def test_a_bump_is_not_a_reason_to_stop_before_it():
    # The step from 2 to 3 saves nothing by itself, the two from 2 to 4 more than any other.
    choices = {("a", "hidden"): (1, 2, 3, 4), ("b", "hidden"): (1, 2, 3, 4)}
    curves = {
        ("a", "hidden"): {1: 10.0, 2: 8.0, 3: 8.0, 4: 0.0},
        ("b", "hidden"): {1: 3.0, 2: 2.0, 3: 1.0, 4: 0.0},
    }
    found = cheapest_widths(curves, choices, [Limit(lambda widths: 1000 + sum(widths.values()), 1005)])
    assert found == {("a", "hidden"): 4, ("b", "hidden"): 1}


@pytest.mark.parametrize(("extra", "equal"), [(0.0, True), (0.004, True), (0.5, False)])
def test_q_k_and_v_are_as_wide_as_each_other_where_that_costs_next_to_nothing(extra, equal):
    choices = dict.fromkeys([("a", "qk"), ("a", "v")], (8, 16, 24, 32))
    curves = {
        ("a", "qk"): {8: 1.0 + extra, 16: 0.5, 24: 0.2, 32: 0.0},
        ("a", "v"): {8: 1.0, 16: 0.5, 24: 0.2 - extra / 4, 32: 0.0},
    }
    curves["a", "v"][8] += 3 * extra
    curves["a", "v"][16] += 3 * extra

    def flops(widths):
        return 10_000 + sum(widths.values())

    found = cheapest_widths(curves, choices, [Limit(flops, 10_000 + 32)])
    assert (found["a", "qk"] == found["a", "v"]) is equal
    assert flops(found) <= 10_032


def test_equal_widths_that_use_as_much_of_a_budget_are_taken_where_steps_fit_it_badly():
    choices = dict.fromkeys([("a", "qk"), ("a", "v")], (8, 16, 24))
    curves = {("a", "qk"): {8: 2.0, 16: 1.0, 24: 0.0}, ("a", "v"): {8: 1.999, 16: 1.0, 24: 0.0}}
    # 24 and 8, or 16 and 16: both leave the same fifth of the budget.
    found = cheapest_widths(curves, choices, [Limit(lambda widths: sum(widths.values()), 39)])
    assert set(found.values()) == {16}


@given(data=st.data())
def test_uniform_widths_are_the_same_share_of_every_unit_but_for_one_step(data):
    problem = Problem.draw(data, fixed=100_000)
    budget = problem.budget(data)
    found = uniform_widths(problem.choices, [Limit(problem.flops, budget)])
    assert problem.flops(found) <= budget
    # Some unit is more than a step ahead of another only where the other's next step would not have fitted.
    for ahead, behind in itertools.permutations(found, 2):
        wider = next((width for width in problem.choices[behind] if width > found[behind]), None)
        if wider is None:
            continue
        level, dense = wider / problem.choices[behind][-1], problem.choices[ahead][-1]
        narrower = [width for width in problem.choices[ahead] if width < found[ahead]]
        if narrower and narrower[-1] / dense > level:
            back = next(width for width in problem.choices[ahead] if width / dense > level)
            assert problem.flops({**found, ahead: back, behind: wider}) > budget
    wider = [
        {**found, key: choices[choices.index(found[key]) + 1]}
        for key, choices in problem.choices.items()
        if found[key] != choices[-1]
    ]
    assert all(problem.flops(plan) > budget for plan in wider)


# --- budgets of time, in which equal widths of q/k and v are faster ---

PAIRS = [("one", "qk"), ("one", "v"), ("two", "qk"), ("two", "v")]


def time_at(widths, extra):
    """1 for each channel, and ``extra`` for each layer whose q/k and v differ in width."""
    unequal = sum(widths[layer, "qk"] != widths[layer, "v"] for layer, kind in widths if kind == "v")
    return 1000 + sum(widths.values()) + extra * unequal


def time_limit(extra, most):
    return Limit(lambda widths: round(1000 * time_at(widths, extra)), round(1000 * most), "max_latency")


@pytest.mark.parametrize(("extra", "widths"), [(9, (16, 16, 8, 32)), (40, (8, 8, 32, 32))])
def test_layers_get_equal_widths_where_that_is_worth_it_and_only_there(extra, widths):
    """One layer loses little by equal widths, the other nearly all it has, unless time is dearer still."""
    choices = dict.fromkeys(PAIRS, (8, 16, 24, 32))
    line = {8: 3.0, 16: 2.0, 24: 1.0, 32: 0.0}
    steep = {8: 60.0, 16: 40.0, 24: 20.0, 32: 0.0}
    nearly_flat = {width: error / 100 for width, error in line.items()}
    curves = dict(zip(PAIRS, (line, line, nearly_flat, steep), strict=True))

    limit = time_limit(extra, 1000 + 81)
    assert cheapest_widths(curves, choices, [limit]) == dict(zip(PAIRS, widths, strict=True))


def test_the_price_of_a_channel_has_nothing_of_what_unequal_widths_cost():
    """Else q/k would seem nearly free, and stay wide at the cost of the MLP."""
    choices = {PAIRS[0]: (8, 16, 24, 32), PAIRS[1]: (16, 32), ("mlp", "hidden"): (8, 16, 24, 32)}
    curves = {
        PAIRS[0]: {8: 3.0, 16: 2.0, 24: 1.0, 32: 0.0},
        PAIRS[1]: {16: 90.0, 32: 0.0},
        ("mlp", "hidden"): {8: 6.0, 16: 4.0, 24: 2.0, 32: 0.0},
    }

    limit = time_limit(20, 1000 + 92)
    assert cheapest_widths(curves, choices, [limit]) == {PAIRS[0]: 8, PAIRS[1]: 32, ("mlp", "hidden"): 32}


def test_unequal_widths_may_lie_far_from_the_equal_ones_in_small_steps():
    """One layer needs all of v and nothing of q/k, the other both alike."""
    choices = dict.fromkeys(PAIRS, tuple(range(1, 33)))
    flat = {width: 0.001 * (32 - width) for width in range(1, 33)}
    line = {width: 1.0 * (32 - width) for width in range(1, 33)}
    curves = dict(zip(PAIRS, (flat, {width: 50 * line[width] for width in line}, line, line), strict=True))

    limit = time_limit(9, 1000 + 9 + 1 + 32 + 46)
    found = cheapest_widths(curves, choices, [limit])
    assert [found[key] for key in PAIRS] == [1, 32, 23, 23]


@given(st.data())
def test_what_unequal_widths_cost_is_weighed_in_every_layer(data):
    """Against all plans that leave the time of a step of q/k and v together: within a step of the best."""
    choices = dict.fromkeys(PAIRS, (8, 16, 24, 32))
    curves = {}
    for key, widths in choices.items():
        rates = sorted(data.draw(st.floats(0.1, 10)) for _ in widths[1:])
        curves[key] = dict(zip(widths, reversed(list(itertools.accumulate(rates, initial=0.0))), strict=True))
    extra = data.draw(st.floats(0, 20))

    most = 1000 + extra + data.draw(st.floats(48, 120))
    found = cheapest_widths(curves, choices, [time_limit(extra, most)])
    assert time_at(found, extra) <= most + 1e-3
    plans = [dict(zip(PAIRS, widths, strict=True)) for widths in itertools.product(*choices.values())]
    step = max(
        curve[narrow] - curve[wide] for curve in curves.values() for narrow, wide in itertools.pairwise(curve)
    )
    least = min(total_error(curves, plan) for plan in plans if time_at(plan, extra) + 16 <= most)
    assert total_error(curves, found) <= least + step + 1e-9
