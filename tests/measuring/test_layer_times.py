"""Times of layers: lines between measured points, and the time of a model."""

from __future__ import annotations

import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhacut.commands import stopwatch
from mhacut.commands.prune_latency import TimeTarget
from mhacut.commands.stopwatch import Stopwatch
from mhacut.measuring import latency
from mhacut.measuring.latency import compare_runs
from mhacut.measuring.layer_times import LayerTimes, Point, TimeTable, points_to_measure
from mhacut.options.timing import TimingOptions
from mhacut.plan import Plan
from mhacut.pruning.allocate import cheapest_widths, total_error
from mhacut.pruning.limits import Limit, width_choices
from mhacut.runtime.progress import SILENT, Silent

CPU = torch.device("cpu")
REST = 100.0
"""Time that no width changes, so long that any plan uses nearly all of a budget."""
ATTENTION = {"qk": (8, 16, 24, 32), "v": (8, 16, 24, 32)}
MLP = {"hidden": tuple(range(8, 129, 8))}


def measured(choices, time):
    """Times of a layer that takes ``time`` of its widths, without noise."""
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


@settings(deadline=None, max_examples=50)
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


def test_equal_widths_may_be_faster_than_unequal_ones():
    def time(widths):
        return widths["qk"] + widths["v"] + 10 * (widths["qk"] != widths["v"])

    times = measured(ATTENTION, time)
    for widths in itertools.product(*ATTENTION.values()):
        own = dict(zip(ATTENTION, widths, strict=True))
        assert times.at(own) == pytest.approx(time(own))


def test_the_narrower_of_unequal_widths_may_be_padded_to_the_wider():
    def time(widths):
        qk, v = widths["qk"], widths["v"]
        return 3 * qk + v + 2 * max(qk, v) + 5 * (qk != v)

    times = measured(ATTENTION, time)
    for widths in itertools.product(*ATTENTION.values()):
        own = dict(zip(ATTENTION, widths, strict=True))
        assert times.at(own) == pytest.approx(time(own))


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


@pytest.mark.parametrize("dense", [(32, 24), (24, 32), (32, 16), (16, 32)])
def test_layers_whose_dense_widths_differ_have_times(dense):
    """As a layer of a slim file has; one of its widths alone can be cut to the other."""
    choices = {kind: tuple(range(8, width + 1, 8)) for kind, width in zip(ATTENTION, dense, strict=True)}

    def time(widths):
        return 3 * widths["qk"] + widths["v"] + 7

    times = measured(choices, time)
    for widths in itertools.product(*choices.values()):
        own = dict(zip(ATTENTION, widths, strict=True))
        assert times.at(own) == pytest.approx(time(own))


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


@settings(deadline=None, max_examples=60)
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


# --- measuring ---


class Clock:
    """A clock that runs as programs say."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        for name in ("perf_counter", "process_time"):
            monkeypatch.setattr(latency.time, name, lambda: self.now)
        monkeypatch.setattr(latency, "_MAX_ROUNDS", 40)

    def program(self, seconds, until=float("inf"), after=1.0):
        """Takes ``seconds``, and ``after`` times as long once it is ``until``."""

        def run():
            self.now += seconds * (after if self.now > until else 1)

        return run


def test_ratios_are_to_the_first(monkeypatch):
    clock = Clock(monkeypatch)
    runs = [clock.program(0.02), clock.program(0.01)]
    found = compare_runs(runs, seconds=1, device=CPU, threads=1)
    assert found.ratios == (1.0, pytest.approx(0.5))
    assert found.milliseconds == pytest.approx((20, 10))
    assert found.steady


def test_a_machine_that_slows_down_is_measured_again(monkeypatch):
    clock = Clock(monkeypatch)
    # The first try ends within its second second; what slows down does so in its midst.
    found = compare_runs([clock.program(0.02, until=0.6, after=1.5)], seconds=1, device=CPU, threads=1)
    assert found.steady
    assert found.milliseconds == pytest.approx((30,))


def test_a_machine_that_never_stands_still_is_reported(monkeypatch):
    clock = Clock(monkeypatch)

    def slower_and_slower():
        clock.now += 0.01 + clock.now / 10

    found = compare_runs([slower_and_slower], seconds=0.1, device=CPU, threads=1)
    assert not found.steady


@pytest.mark.parametrize(("spread", "tries"), [(0.0, 1), (0.02, 1), (0.08, 2), (0.5, 5)])
def test_ratios_that_scatter_are_measured_for_longer(monkeypatch, spread, tries):
    """Their standard error is that of the median of all rounds of all tries."""
    clock, count, original = Clock(monkeypatch), [], latency._turns
    monkeypatch.setattr(latency, "_turns", lambda *given: count.append(None) or original(*given))
    generator = random.Random(0)

    def run():
        clock.now += 0.01 * math.exp(spread * generator.gauss(0, 1))

    runs, precision = [clock.program(0.02), run], 0.015
    found = compare_runs(runs, seconds=1, device=CPU, threads=1, precision=precision)
    assert len(count) == tries
    assert found.ratios[1] == pytest.approx(0.5, rel=4 * precision)
    per_try = 34
    assert found.error == pytest.approx(1.2533 * spread / (per_try * tries) ** 0.5, rel=0.4, abs=1e-9)
    assert (found.error <= precision) == (tries < 5)


def test_other_programs_do_not_take_rounds_from_process_time(monkeypatch):
    """Half of the wall time is theirs: there are as many rounds, in twice the time."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: 2 * clock.now)
    rounds = []

    def run():
        clock.now += 0.1 + 1e-5 * (len(rounds) % 2)  # a clock that is always the same would be coarse
        rounds.append(clock.now)

    found = compare_runs([run], seconds=1.0, device=CPU, threads=1)
    assert len(rounds) == pytest.approx(3 + 10, abs=1)
    assert found.milliseconds == pytest.approx((100,), rel=1e-3)
    assert found.wall == pytest.approx((200,), rel=1e-3)


@pytest.mark.parametrize("precision", [None, 0.01])
@pytest.mark.parametrize("times", [(0.017, 0.030), (0.002, 0.001), (0.017, 0.100), (2.0, 0.5)])
def test_wall_time_is_compared_where_the_clock_of_the_process_ticks_coarsely(monkeypatch, times, precision):
    """It has run for some days, so that differences of whole ticks are rounded; one call may take 100."""
    clock, tick = Clock(monkeypatch), 0.0156001
    monkeypatch.setattr(latency.time, "process_time", lambda: 4e5 / 3 + clock.now // tick * tick)
    seconds = 40 * max(times)
    runs = [clock.program(own) for own in times]
    found = compare_runs(runs, seconds=seconds, device=CPU, threads=1, precision=precision)
    assert found.ratios == (1, pytest.approx(times[1] / times[0]))
    assert found.milliseconds == found.wall


def test_few_calls_that_are_far_apart_are_no_coarse_clock(monkeypatch):
    """The least step between ten readings of a busy machine may be hundredths of a call."""
    clock, calls = Clock(monkeypatch), []

    def run():
        calls.append(None)
        clock.now += 1 + 0.05 * len(calls)

    monkeypatch.setattr(latency.time, "process_time", lambda: clock.now / 2)
    found = compare_runs([run, run], seconds=0, device=CPU, threads=1)
    assert found.milliseconds[0] == pytest.approx(found.wall[0] / 2)


def test_tries_by_different_clocks_are_not_compared(monkeypatch):
    """The clock of the process turns coarse after the first try, which has drifted less than the others."""
    clock, tries, original = Clock(monkeypatch), [], latency._turns
    monkeypatch.setattr(latency, "_turns", lambda *given: tries.append(clock.now) or original(*given))

    def run():
        clock.now += 0.02 + (0.002 if len(tries) == 1 else 0.01) * clock.now

    def process_time():
        tick = 1e-6 if len(tries) == 1 else 0.25
        return clock.now // tick * tick

    monkeypatch.setattr(latency.time, "process_time", process_time)
    readings = itertools.count()  # each takes a microsecond
    monkeypatch.setattr(latency.time, "perf_counter", lambda: 2 * clock.now + 1e-6 * next(readings))
    found = compare_runs([run], seconds=1.5, device=CPU, threads=1)
    assert (len(tries), found.steady) == (3, False)
    assert found.milliseconds == found.wall


def test_cut_models_are_timed_precisely_and_layers_are_not(monkeypatch):
    asked = []

    def compared(runs, *, precision, **options):
        asked.append(precision)
        return latency.Comparison((1.0, 0.5), (1.0, 0.5), (1.0, 0.5), 0.0)

    monkeypatch.setattr(stopwatch, "compare_runs", compared)
    watch = Stopwatch(TimingOptions(), torch.nn.Conv2d(3, 1, 1), (3, 4, 4), CPU, SILENT)
    monkeypatch.setattr(TimeTarget, "_afresh", lambda *_: None)
    target = TimeTarget("50%", watch, Plan(()))
    target.times = SimpleNamespace(dense=100)
    assert target.time(torch.nn.Conv2d(3, 1, 1), None).nanoseconds == 50
    watch.parts([], seconds=0.1)
    assert asked == [0.005, None]


def test_a_busy_machine_is_logged_once_in_each_stage(monkeypatch):
    busy = latency.Comparison((1.0,), (1.0,), (1.0,), drift=0.2)
    monkeypatch.setattr(stopwatch, "compare_runs", lambda runs, **options: busy)
    log = Log()
    watch = Stopwatch(TimingOptions(), torch.nn.Conv2d(3, 1, 1), (3, 4, 4), CPU, log)
    for stage in ("timing layers", "timing"):
        watch.start(stage)
        watch.parts([], seconds=0.1)
        watch.beside([], seconds=0.1)
    line = "this machine is busy: the time of the same program varied by 20 % while it was measured"
    assert log.lines == ["timing layers", line, "timing", line]


class Log(Silent):
    """A reporter that keeps stages and messages."""

    def __init__(self):
        self.lines = []
        self.start = self.log = self.lines.append


@pytest.mark.parametrize(
    ("device", "at", "copied"),
    [("cuda", "cuda:1", False), ("cuda:1", "cuda:1", False), ("cuda", "cuda:0", True), ("cuda", "cpu", True)],
)
def test_a_model_that_is_on_the_device_is_not_copied(monkeypatch, device, at, copied):
    """The current GPU is the second."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(stopwatch, "timing_device", lambda runtime, name: torch.device(device))
    timed = []
    monkeypatch.setattr(stopwatch, "model_program", lambda model, size, conditions: timed.append(model))
    monkeypatch.setattr(stopwatch, "fixed_images", lambda number, size: Placed(device))
    monkeypatch.setattr(stopwatch, "run_of", lambda program, images: program)
    model = Placed(at)
    Stopwatch(TimingOptions(), model, (3, 4, 4), CPU, SILENT)._run(model, 1)
    assert (timed[0] is not model) == copied


class Placed:
    """A model, or images, on a device that this machine may not have."""

    def __init__(self, device):
        self.device = torch.device(device)

    def parameters(self):
        return iter([self])

    def to(self, device):
        return Placed(device)
