"""Progress: seconds of stages, and the bar or the lines that show how far a stage is."""

from __future__ import annotations

import sys
import time
from types import ModuleType, SimpleNamespace

import pytest

from helpers.jobs import Recorder
from mhacut.runtime.progress import SILENT, StageDisplay, StageTimer, reporting


def test_a_timer_passes_everything_on_and_adds_up_seconds():
    recorder = Recorder()
    timer = StageTimer(recorder)
    for stage, seconds in (("repairing", 0.03), ("searching", 0.02), ("repairing", 0.04)):
        timer.start(stage)
        timer.advance(1, 2, "loss 0.5")
        time.sleep(seconds)
    timer.log("a message")
    assert (recorder.stages, recorder.messages) == (["repairing", "searching", "repairing"], ["a message"])
    assert (recorder.steps, recorder.details) == ([(1, 2)] * 3, ["loss 0.5"] * 3)
    taken = timer.taken()
    assert list(taken) == ["repairing", "searching"]
    assert taken["repairing"] >= 0.07
    assert timer.taken() == {}


@pytest.mark.parametrize("every", [0.0, None])
def test_long_stages_give_a_line_now_and_then(every):
    lines = []
    display = StageDisplay(lines.append, every)
    display.start("training")
    display.advance(2, 20, "loss 0.5\x1b[2J")
    display.close()
    shown = [line.split(" elapsed")[0] for line in lines]
    assert shown == [r"training: 2/20, loss 0.5\x1b[2J, 0:00:00"] * (every == 0)


def test_who_shows_the_progress(monkeypatch):
    recorder = Recorder()
    with reporting(recorder, True) as found:
        assert found is recorder
    with reporting(None, False) as found:
        assert found is SILENT
    with reporting(None, None) as found:
        assert found is SILENT  # a test is no terminal
    with reporting(None, True) as found:
        assert isinstance(found, StageDisplay)
    ipython = ModuleType("IPython")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    with reporting(None, None) as found:
        assert found is SILENT  # rich shows no bar in a notebook without ipywidgets
    monkeypatch.setenv("RANK", "1")
    with reporting(None, True) as found:
        assert found is not SILENT  # of one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with reporting(None, True) as found:
        assert found is SILENT
