"""Models take turns, and the slower one is found to be slower."""

from __future__ import annotations

import math
import random
import time

import pytest
import torch

from mhacut.measuring import latency
from mhacut.measuring.latency import compare_runs, fixed_images, run_of, take_turns

CPU = torch.device("cpu")


def sleeper(name, milliseconds, diary):
    def run():
        diary.append(name)
        time.sleep(milliseconds / 1000)

    return run


def test_programs_take_turns_and_every_other_round_runs_backwards() -> None:
    diary: list[str] = []
    slow, fast = take_turns([sleeper("a", 20, diary), sleeper("b", 5, diary)], seconds=0.0, device=CPU)
    warm_up, rounds = diary[:6], diary[6:]
    assert warm_up == ["a"] * 3 + ["b"] * 3
    assert "".join(rounds) == "abbaabbaab"  # five rounds at least, whatever the time
    assert (len(slow), len(fast)) == (5, 5)
    # sleep never returns early; on a busy machine it may return late
    assert min(slow) >= 0.02 > 0.005 <= min(fast)


def test_a_model_runs_without_gradients() -> None:
    def model(images):
        assert torch.is_inference_mode_enabled()
        return images.shape

    assert run_of(model, fixed_images(2, (3, 8, 8)))() == (2, 3, 8, 8)


class Clock:
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
        clock.now += 0.1
        rounds.append(clock.now)

    found = compare_runs([run], seconds=1.0, device=CPU, threads=1)
    assert len(rounds) == pytest.approx(3 + 10, abs=1)
    assert found.milliseconds == pytest.approx((100,), rel=1e-3)
    assert found.wall == pytest.approx((200,), rel=1e-3)
