"""Models take turns, and the slower one is found to be slower."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from mhacut.measuring import latency
from mhacut.measuring.latency import compare_latency

CPU = torch.device("cpu")


class Sleeper(nn.Module):
    """Takes a known time and keeps a diary."""

    def __init__(self, name: str, milliseconds: float, diary: list[str]) -> None:
        super().__init__()
        self.name, self.milliseconds, self.diary = name, milliseconds, diary
        self.shape: tuple[int, ...] = ()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.diary.append(self.name)
        self.shape = tuple(images.shape)
        assert torch.is_inference_mode_enabled()
        time.sleep(self.milliseconds / 1000)
        return images


def test_medians_are_milliseconds_in_the_order_given() -> None:
    diary: list[str] = []
    slow, fast = Sleeper("slow", 20, diary), Sleeper("fast", 5, diary)
    times = compare_latency((slow, fast), (3, 8, 8), batch_size=2, seconds=0.3, device=CPU)
    # sleep never returns early; on a busy machine it may return late
    assert times[0] >= 20
    assert 5 <= times[1] < times[0] < 1000
    assert slow.shape == fast.shape == (2, 3, 8, 8)


def test_models_take_turns_and_every_other_round_runs_backwards() -> None:
    diary: list[str] = []
    compare_latency([Sleeper(name, 1, diary) for name in "ab"], (3, 4, 4), seconds=0.0, device=CPU)
    warm_up, rounds = diary[:6], diary[6:]
    assert warm_up == ["a"] * 3 + ["b"] * 3
    assert "".join(rounds) == "abbaabbaab"  # five rounds at least, whatever the time


def test_a_slow_round_does_not_move_the_median() -> None:
    class Hiccup(Sleeper):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if len(self.diary) == 5:
                time.sleep(0.2)
            return super().forward(images)

    assert compare_latency([Hiccup("a", 1, [])], (3, 4, 4), seconds=0.0, device=CPU)[0] < 100


@pytest.mark.parametrize("seconds", [0.1, 0.4])
def test_time_is_bounded(seconds) -> None:
    began = time.perf_counter()
    compare_latency([Sleeper("a", 10, [])], (3, 4, 4), seconds=seconds, device=CPU)
    assert time.perf_counter() - began < seconds + 1


def test_rounds_are_bounded(monkeypatch) -> None:
    monkeypatch.setattr(latency, "_MAX_ROUNDS", 7)
    diary: list[str] = []
    compare_latency([Sleeper("a", 0, diary)], (3, 4, 4), seconds=60, device=CPU)
    assert len(diary) == 3 + 7
