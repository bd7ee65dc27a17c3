"""Reporters that pass on what they receive."""

from __future__ import annotations

from helpers.jobs import Recorder
from mhacut.runtime.progress import Counter, StageTimer


def test_a_timer_passes_everything_on():
    recorder = Recorder()
    timer = StageTimer(recorder)
    timer.start("reading")
    timer.log("a message")
    timer.advance(1, 2, "loss 0.5")
    assert (recorder.stages, recorder.messages) == (["reading"], ["a message"])
    assert (recorder.steps, recorder.details) == ([(1, 2)], ["loss 0.5"])


def test_seconds_of_a_stage_that_is_run_twice_add_up(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    timer = StageTimer(Recorder())
    for stage, seconds in (("repairing", 3.0), ("searching", 5.0), ("repairing", 4.0)):
        timer.start(stage)
        now += seconds
    timer.stop()
    now += 100.0
    timer.stop()
    assert timer.seconds == {"repairing": 7.0, "searching": 5.0}


def test_a_counter_adds_up_pieces():
    recorder = Recorder()
    counter = Counter(recorder, 10)
    for pieces in (4, 4, 2):
        counter.add(pieces)
    assert recorder.steps == [(4, 10), (8, 10), (10, 10)]
