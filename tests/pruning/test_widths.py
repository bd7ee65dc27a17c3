from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mhacut.pruning.allocate import fill_budget
from mhacut.pruning.limits import Limit, lowest_flops, nearest_width, width_choices


@given(dense=st.integers(1, 100), round_to=st.integers(1, 20), count=st.floats(0, 100))
def test_allowed_widths(dense, round_to, count):
    choices = width_choices(dense, round_to)
    assert choices[-1] == dense
    assert all(width % round_to == 0 for width in choices[:-1])
    assert list(choices) == sorted(set(choices))
    best = min(abs(width - count) for width in choices)
    assert abs(nearest_width(count, dense, round_to) - count) == best


@given(data=st.data(), units=st.integers(1, 3), round_to=st.integers(1, 3))
def test_filled_budgets_fit_and_leave_less_than_one_percent_where_they_can(data, units, round_to):
    keys = [(f"layer{i}", "v") for i in range(units)]
    dense = {key: data.draw(st.integers(1, 7)) for key in keys}
    price = {key: data.draw(st.integers(1, 9)) for key in keys}
    ranked = {
        key: sorted(
            data.draw(st.lists(st.floats(-1, 1), min_size=dense[key], max_size=dense[key])), reverse=True
        )
        for key in keys
    }
    choices = {key: width_choices(dense[key], round_to) for key in keys}

    def flops(widths):
        return 10 + sum(price[key] * width for key, width in widths.items())

    low = lowest_flops(choices, flops)
    assert low == min(
        flops(dict(zip(keys, widths, strict=True)))
        for widths in itertools.product(*(choices[key] for key in keys))
    )
    budget = data.draw(st.integers(low, flops(dense)))
    widths = fill_budget(ranked, choices, [Limit(flops, budget)])
    assert flops(widths) <= budget
    assert all(widths[key] in choices[key] for key in keys)
    # As near as any widths can come, where that is within 1 %; else no single step fits any more.
    reachable = [
        dict(zip(keys, every, strict=True)) for every in itertools.product(*(choices[key] for key in keys))
    ]
    nearest = max(flops(other) for other in reachable if flops(other) <= budget)
    assert flops(widths) >= min(nearest, 0.99 * budget)


def test_the_better_channels_win():
    ranked = {("a", "v"): [0.9, 0.8, 0.2, 0.1], ("b", "v"): [0.7, 0.3, 0.25, 0.24]}
    choices = dict.fromkeys(ranked, (1, 2, 3, 4))
    widths = fill_budget(ranked, choices, [Limit(lambda widths: sum(widths.values()), 4)])
    assert widths == {("a", "v"): 2, ("b", "v"): 2}
