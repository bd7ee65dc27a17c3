"""Progress: seconds of stages, and the bar or the lines that show how far a stage is."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

from helpers.jobs import Recorder
from helpers.terminals import terminal
from mhacut.runtime import progress
from mhacut.runtime.progress import SILENT, Counter, StageDisplay, StageTimer, reporting


def test_a_timer_passes_everything_on_and_adds_up_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    recorder = Recorder()
    timer = StageTimer(recorder)
    for stage, seconds in (("repairing", 3.0), ("searching", 5.0), ("repairing", 4.0)):
        timer.start(stage)
        timer.advance(1, 2, "loss 0.5")
        now[0] += seconds
    timer.log("a message")
    assert (recorder.stages, recorder.messages) == (["repairing", "searching", "repairing"], ["a message"])
    assert (recorder.steps, recorder.details) == ([(1, 2)] * 3, ["loss 0.5"] * 3)
    assert timer.taken() == {"repairing": 7.0, "searching": 5.0}
    now[0] += 100.0
    assert timer.taken() == {}


def test_a_counter_adds_up_pieces():
    recorder = Recorder()
    counter = Counter(recorder, 10)
    for pieces in (4, 4, 2):
        counter.add(pieces)
    assert recorder.steps == [(4, 10), (8, 10), (10, 10)]


def test_long_stages_give_a_line_now_and_then(monkeypatch):
    lines = []
    display = StageDisplay(lines.append)
    display.start("training")
    display.advance(1, 20)
    assert lines == []
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    display.advance(2, 20, "loss 0.5\x1b[2J")
    assert [line.split(" elapsed")[0] for line in lines] == [r"training: 2/20, loss 0.5\x1b[2J, 0:00:00"]
    display.close()


def test_on_a_terminal_a_bar_shows_the_stage(monkeypatch):
    with terminal(monkeypatch) as stream:
        with reporting(None, None) as display:
            display.start("calibrating")
            display.start("healing")
            display.advance(120, 480)
        assert "healing" in stream.getvalue()
        assert "120/480" in stream.getvalue()


def test_who_shows_the_progress(monkeypatch, capsys):
    recorder = Recorder()
    with reporting(recorder, True) as found:
        assert found is recorder
    with reporting(None, False) as found:
        assert found is SILENT
    with reporting(None, None) as found:
        assert found is SILENT  # a test is no terminal
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with reporting(None, True) as found:
        found.start("reading")
        found.advance(1, 2)
    assert capsys.readouterr().err.startswith("reading: 1/2, 0:00:00 elapsed")
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
