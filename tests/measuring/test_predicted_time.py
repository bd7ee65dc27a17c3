"""Times of layers: lines between measured points, and the time of a model."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhacut.measuring.predicted_time import LayerTimes, Point, TimeTable, points_to_measure
from mhacut.pruning.allocate import cheapest_widths, total_error
from mhacut.pruning.limits import Limit, width_choices

REST = 100.0
"""Time that no width changes, so long that any plan uses nearly all of a budget."""
ATTENTION = {"qk": (8, 16, 24, 32), "v": (8, 16, 24, 32)}
MLP = {"hidden": tuple(range(8, 129, 8))}


def measured(choices, time):
    points = [Point(widths, time(widths)) for widths in points_to_measure(choices)]
    return LayerTimes(points[0], tuple(points[1:]))


# --- one layer ---


def test_all_channels_are_measured_first_then_equal_widths_and_unequal_ones_both_ways_round():
    points = points_to_measure(ATTENTION)
    assert points[0] == {"qk": 32, "v": 32}
    equal = [(8, 8), (16, 16), (24, 24)]
    unequal = [(16, 8), (8, 16), (32, 8), (8, 32)]
    assert [tuple(point.values()) for point in points[1:]] == equal + unequal
    assert points_to_measure(MLP) == [{"hidden": width} for width in (128, 8, 32, 64, 96)]
    assert points_to_measure({"hidden": (6,)}) == [{"hidden": 6}]
    assert len(points) == len({tuple(point.items()) for point in points})


@given(st.data())
def test_a_cost_that_is_linear_in_every_width_is_found_exactly(data):
    price = {kind: data.draw(st.floats(0, 1)) for kind in ("qk", "v", "hidden")}
    rest = data.draw(st.floats(0, 100))
    choices = {**ATTENTION, **MLP}

    def time(widths):
        return rest + sum(price[kind] * width for kind, width in widths.items())

    times = measured(choices, time)
    for widths in itertools.product(ATTENTION["qk"], ATTENTION["v"], (8, 48, 128)):
        own = dict(zip(choices, widths, strict=True))
        assert times.at(own) == pytest.approx(time(own), abs=1e-9)


def unequal_is_slower(qk, v):
    return qk + v + 10 * (qk != v)


def narrower_is_padded(qk, v):
    return 3 * qk + v + 2 * max(qk, v) + 5 * (qk != v)


def linear(qk, v):
    return 3 * qk + v + 7


@pytest.mark.parametrize(
    ("dense", "time"),
    [
        ((32, 32), unequal_is_slower),
        ((32, 32), narrower_is_padded),
        *(((qk, v), linear) for qk, v in ((32, 24), (24, 32), (32, 16), (16, 32))),
    ],
)
def test_times_of_attention_at_any_widths(dense, time):
    """Also of a slim file's layer, of which one width alone can be cut to the other."""
    choices = {kind: tuple(range(8, width + 1, 8)) for kind, width in zip(ATTENTION, dense, strict=True)}
    times = measured(choices, lambda widths: time(**widths))
    for widths in itertools.product(*choices.values()):
        own = dict(zip(ATTENTION, widths, strict=True))
        assert times.at(own) == pytest.approx(time(**own))


def test_measured_times_are_those_measured():
    """Also where q/k wider than v and v wider than q/k differ by no line."""
    choices = {kind: tuple(range(8, 65, 8)) for kind in ATTENTION}
    shares = {(64, 8): 60.0, (8, 64): 52.0}

    def time(widths):
        qk, v = widths["qk"], widths["v"]
        return shares.get((qk, v), 0.5 * (qk + v) + 5 * (qk != v))

    times = measured(choices, time)
    for widths in points_to_measure(choices):
        assert times.at(widths) == pytest.approx(time(widths)), widths


def test_unequal_widths_never_seem_faster_than_both_at_the_lesser():
    def noisy(widths):
        return widths["qk"] + widths["v"] - 40 * (widths["qk"] > widths["v"])

    times = measured(ATTENTION, noisy)
    for qk, v in itertools.product(*ATTENTION.values()):
        lesser = min(qk, v)
        assert times.at({"qk": qk, "v": v}) >= times.at({"qk": lesser, "v": lesser})


def test_noise_never_makes_a_narrower_layer_slower():
    shares = {8: 3.0, 32: 5.0, 64: 4.0, 96: 9.0, 128: 8.0}
    times = measured(MLP, lambda widths: shares[widths["hidden"]])
    found = [times.at({"hidden": width}) for width in MLP["hidden"]]
    assert found == sorted(found)
    assert times.at({"hidden": 32}) == times.at({"hidden": 64}) == 4.5


# --- the whole model ---


def table_of(prices, choices, rest=REST, anchors=True):
    """Times of a model of MLPs: a rest, and a price per channel, of which layers alone show four fifths."""
    layers = tuple(
        measured({"hidden": choices[key]}, lambda widths, price=price: 0.8 * price * widths["hidden"])
        for key, price in prices.items()
    )
    calls = tuple((name, number) for number, (name, _) in enumerate(prices))
    full = rest + sum(price * choices[key][-1] for key, price in prices.items())
    table = TimeTable(calls, layers, full)
    least = {key: widths[0] for key, widths in choices.items()}
    time = rest + sum(price * least[key] for key, price in prices.items())
    return table.with_anchors([(least, time)]) if anchors else table


@given(st.data())
def test_widths_within_a_budget_of_time_keep_it_and_are_a_step_from_the_best(data):
    """Against all plans, in the times that the table was made of."""
    keys = [(f"blocks.{number}.mlp", "hidden") for number in range(data.draw(st.integers(2, 3)))]
    choices = {key: width_choices(8 * data.draw(st.integers(3, 5)), 8) for key in keys}
    prices = {key: data.draw(st.floats(1e-4, 5e-3)) for key in keys}
    curves = {}
    for key, widths in choices.items():
        rates = sorted(data.draw(st.floats(0.01, 10)) for _ in widths[1:])
        curves[key] = dict(zip(widths, reversed(list(itertools.accumulate(rates, initial=0.0))), strict=True))
    table = table_of(prices, choices)

    def time(widths):
        return REST + sum(price * widths[key] for key, price in prices.items())

    plans = [dict(zip(keys, widths, strict=True)) for widths in itertools.product(*choices.values())]
    for plan in plans:
        assert table.at(plan) == pytest.approx(1e9 * time(plan), rel=1e-6)
    low, high = (time({key: widths[end] for key, widths in choices.items()}) for end in (0, -1))
    most = low + data.draw(st.floats(0.01, 0.99)) * (high - low)
    found = cheapest_widths(curves, choices, [Limit(table.at, round(1e9 * most), "max_latency")])
    assert time(found) <= most * (1 + 1e-6)
    best = min(total_error(curves, plan) for plan in plans if time(plan) <= most)
    step = max(
        curve[narrow] - curve[wide] for curve in curves.values() for narrow, wide in itertools.pairwise(curve)
    )
    assert total_error(curves, found) <= best + step + 1e-9


def test_layers_alone_are_scaled_to_what_models_save():
    keys = {("a", "hidden"): (8, 16, 24, 32), ("b", "hidden"): (8, 16)}
    prices = dict.fromkeys(keys, 0.01)
    plain, scaled = table_of(prices, keys, anchors=False), table_of(prices, keys)
    whole = {key: widths[-1] for key, widths in keys.items()}
    half = dict.fromkeys(keys, 8)
    assert plain.at(whole) == scaled.at(whole)
    assert scaled.at(whole) - scaled.at(half) == pytest.approx(1.25 * (plain.at(whole) - plain.at(half)))


def test_a_layer_that_runs_twice_counts_twice():
    layer = measured({"hidden": (8, 16)}, lambda widths: widths["hidden"] / 100)
    once, twice = (TimeTable((("a", 0),) * runs, (layer,), 1.0) for runs in (1, 2))
    cut = {("a", "hidden"): 8}
    assert once.dense - once.at(cut) == 80_000_000
    assert twice.dense - twice.at(cut) == 160_000_000
