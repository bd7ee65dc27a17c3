"""Progress: seconds of stages, an estimate of what is left, and one bar or a few lines that show it."""

from __future__ import annotations

import ast
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mhacut
from helpers.jobs import Recorder
from helpers.terminals import terminal
from mhacut.runtime import progress_bar, stages
from mhacut.runtime.progress import SILENT, Counter, StageTimer, expect
from mhacut.runtime.progress_bar import LinesView, NotebookView, ProgressBar, TerminalView, reporting
from mhacut.runtime.stages import STAGES, Snapshot, StageClock, StageShare, clock


class Time:
    """A clock that goes when it is put forward."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def time(monkeypatch):
    made = Time()
    for module in (stages, progress_bar):
        monkeypatch.setattr(module, "time", made)
    return made


def run_stage(target, time, stage, seconds, steps, check=lambda: None):
    target.start(stage)
    for step in range(1, steps + 1):
        time.now += seconds / steps
        target.advance(step, steps)
        check()
    if not steps:
        time.now += seconds


def test_a_timer_passes_everything_on():
    recorder = Recorder()
    timer = StageTimer(recorder)
    timer.start("reading")
    timer.log("a message")
    timer.advance(1, 2, "loss 0.5")
    assert (recorder.stages, recorder.messages) == (["reading"], ["a message"])
    assert (recorder.steps, recorder.details) == ([(1, 2)], ["loss 0.5"])
    expect(timer, [StageShare("reading", 1.0)])  # which a recorder has no use for


def test_seconds_of_a_stage_that_is_run_twice_add_up(time):
    timer = StageTimer(Recorder())
    for stage, seconds in (("repairing", 3.0), ("searching", 5.0), ("repairing", 4.0)):
        timer.start(stage)
        time.now += seconds
    assert timer.seconds == {"repairing": 7.0, "searching": 5.0}
    timer.stop()
    time.now += 100.0
    timer.stop()
    assert timer.seconds == {"repairing": 7.0, "searching": 5.0}


def test_a_counter_adds_up_pieces():
    recorder = Recorder()
    counter = Counter(recorder, 10)
    for pieces in (4, 4, 2):
        counter.add(pieces)
    assert recorder.steps == [(4, 10), (8, 10), (10, 10)]


# -- the estimate --


@settings(deadline=None, max_examples=60)
@given(
    true=st.lists(st.tuples(st.floats(0.1, 1e4), st.integers(0, 9)), min_size=1, max_size=6),
    scale=st.floats(1e-3, 1e3),
)
def test_with_right_shares_the_estimate_is_right(true, scale):
    time = Time()
    with mock.patch.object(stages, "time", time):
        clock = StageClock()
        clock.expect([StageShare(str(number), seconds * scale) for number, (seconds, _) in enumerate(true)])
        total = sum(seconds for seconds, _ in true)
        assert clock.left() is None

        def check():
            left = clock.left()
            if left is None:
                assert time.now < 0.0501 * total
            else:
                assert left == pytest.approx(total - time.now, rel=1e-6, abs=1e-6 * total)

        for number, (seconds, steps) in enumerate(true):
            run_stage(clock, time, str(number), seconds, steps, check)
            clock.stop()
            check()
        assert clock.snapshot().fraction == pytest.approx(1)


def test_a_short_stage_does_not_foretell_a_long_one(time):
    clock = StageClock()
    clock.expect([StageShare("evaluating", 1), StageShare("calibrating", 99)])
    run_stage(clock, time, "evaluating", 100, 10)  # most of it is reading images
    assert clock.left() is None
    clock.start("calibrating")
    time.now += 1
    clock.advance(1, 50)
    assert clock.left() == pytest.approx(49)


def test_what_took_longer_than_its_share_makes_the_rest_longer(time):
    clock = StageClock()
    clock.expect([StageShare("calibrating", 10), StageShare("healing", 20), StageShare("writing", 1)])
    run_stage(clock, time, "calibrating", 30, 3)
    assert clock.left() == pytest.approx(63)
    clock.start("healing")
    assert clock.left() == pytest.approx(63)
    time.now += 100  # it is twice as slow as calibration suggested
    clock.advance(10, 12)
    assert clock.left() == pytest.approx(20 + 1 * 130 / (10 + 20 * 10 / 12))


def test_seconds_of_stages_that_nobody_expects_do_not_count(time):
    clock = StageClock()
    run_stage(clock, time, "starting", 100, 0)
    clock.expect([StageShare("calibrating", 1), StageShare("healing", 1)])
    run_stage(clock, time, "calibrating", 5, 2)
    assert clock.left() == pytest.approx(5)


def test_stages_that_were_left_out_or_ended_early_are_over(time):
    clock = StageClock()
    clock.expect([StageShare(stage, 1) for stage in ("calibrating", "searching", "healing", "writing")])
    clock.start("calibrating")
    time.now += 9
    clock.advance(9, 10)
    clock.start("healing")
    time.now += 5
    clock.advance(1, 2)
    assert clock.left() == pytest.approx(5 + 14 / (0.9 + 0.5))


def test_training_goes_on_after_each_measurement(time):
    clock = StageClock()
    clock.expect([StageShare("evaluating", 8, 4), StageShare("training", 60)])
    run_stage(clock, time, "evaluating", 2, 2)
    left = 66.0
    for epoch in range(2):
        clock.start("training")
        for step in range(3):
            time.now += 10
            left -= 10
            clock.advance(3 * epoch + step + 1, 6)
            assert clock.left() == pytest.approx(left)
        run_stage(clock, time, "evaluating", 2, 2)
        left -= 2
        assert clock.left() == pytest.approx(left)


def test_what_an_earlier_run_did_took_no_time_of_this_one(time):
    clock = StageClock()
    clock.expect([StageShare("training", 100, done=0.9)])
    clock.start("training")
    assert clock.left() is None
    time.now += 2
    clock.advance(92, 100)
    assert clock.left() == pytest.approx(8)


def test_the_clock_is_written_as_people_do():
    assert [clock(seconds) for seconds in (0, 59.6, 61, 3599, 3661.2)] == [
        "0:00",
        "1:00",
        "1:01",
        "59:59",
        "1:01:01",
    ]
    state = Snapshot("healing", 120, 480, "loss 0.5", 62, 130)
    assert state.line == "healing: 120 of 480 (25 %), loss 0.5, 1:02 elapsed, about 2:10 left"
    assert Snapshot("repairing", 0, 0, "", 62, None).line == "repairing: 1:02 elapsed"


# -- what is shown --


def test_without_a_terminal_long_stages_give_a_line_every_ten_seconds(time):
    lines = []
    bar = ProgressBar(LinesView(lines.append))
    bar.expect([StageShare("reading", 9), StageShare("training", 40)])
    run_stage(bar, time, "reading", 9, 9)
    assert lines == []
    run_stage(bar, time, "training", 40, 20)
    assert lines == [
        "training: 5 of 20 (25 %), 0:19 elapsed, about 0:30 left",
        "training: 10 of 20 (50 %), 0:29 elapsed, about 0:20 left",
        "training: 15 of 20 (75 %), 0:39 elapsed, about 0:10 left",
        "training: 20 of 20 (100 %), 0:49 elapsed",
    ]
    run_stage(bar, time, "writing", 9, 9)
    assert len(lines) == 4


def test_a_stage_without_news_gives_lines_too(monkeypatch):
    monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_LINES", 0.05)
    monkeypatch.setattr(progress_bar, "_SECONDS_BETWEEN_CHECKS", 0.01)
    lines, written = [], threading.Event()

    def say(line):
        lines.append(line)
        if len(lines) == 2:
            written.set()

    view = LinesView(say)
    bar = ProgressBar(view)
    bar.start("repairing")
    assert written.wait(20)  # nothing is reported meanwhile
    view.close()
    view._thread.join()
    assert set(lines) == {"repairing: 0:00 elapsed"}


def test_on_a_terminal_there_is_one_bar_for_all_stages(monkeypatch, time):
    with terminal(monkeypatch) as stream:
        view = TerminalView()
        bar = ProgressBar(view)
        bar.expect([StageShare("calibrating", 1), StageShare("healing", 3)])
        run_stage(bar, time, "calibrating", 10, 2)
        bar.start("healing")
        (task,) = view._progress.tasks
        assert task.description == "healing"
        assert task.completed / task.total == pytest.approx(0.25)
        assert task.fields["left"] == "about 0:30 left"
        view.close()
        assert "healing" in stream.getvalue()


class Page:
    """The output of a notebook's cell."""

    def __init__(self):
        self.shown = []

    def display(self, first, display_id):
        assert display_id is True
        self.update(first)
        return self

    def update(self, item):
        self.shown.append(item._repr_html_())


@pytest.fixture
def notebook(monkeypatch):
    page = Page()
    ipython, display = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())
    display.display = page.display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return page


def test_in_a_notebook_one_bar_is_updated_and_emptied(notebook, time):
    with reporting(None, None) as bar:
        bar.expect([StageShare("calibrating", 1), StageShare("training", 1)])
        run_stage(bar, time, "calibrating", 10, 2)
        bar.start("training")
        assert notebook.shown[-1] == (
            '<progress value="0.500"></progress> training: 0:10 elapsed, about 0:10 left'
        )
        before = len(notebook.shown)
        for step in range(100):  # a message to the page for each would be too many
            time.now += 0.01
            bar.advance(step, 1000, "<b>loss</b>\x1b[2J")
        assert 3 <= len(notebook.shown) - before <= 5
        assert r"&lt;b&gt;loss&lt;/b&gt;\x1b[2J" in notebook.shown[-1]
    assert notebook.shown[-1] == ""


def test_a_bar_is_taken_off_after_an_error(notebook):
    def fail():
        with reporting(None, None) as bar:
            bar.start("reading")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert notebook.shown[-1] == ""


def test_who_shows_the_progress(monkeypatch, notebook, capsys):
    recorder = Recorder()
    with reporting(recorder, True) as found:
        assert found is recorder
    with reporting(None, False) as found:
        assert found is SILENT
    with reporting(None, None) as found:
        assert isinstance(found._view, NotebookView)
    monkeypatch.delitem(sys.modules, "IPython")
    with reporting(None, None) as found:
        assert found is SILENT  # a test is no terminal
    with reporting(None, True) as found:
        assert isinstance(found._view, LinesView)
        monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_LINES", 0.0)
        found.start("reading")
        found.advance(1, 2)
    assert capsys.readouterr().err == "reading: 1 of 2 (50 %), 0:00 elapsed\n"
    monkeypatch.setenv("RANK", "1")
    with reporting(None, True) as found:
        assert found is not SILENT  # of one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with reporting(None, True) as found:
        assert found is SILENT


# -- names --


def started_stages():
    """Name of every stage that the package begins, and the module that does."""
    package = Path(mhacut.__file__).parent
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            owner, _, function = ast.unparse(node.func).rpartition(".")
            if function == "start" and owner.rpartition(".")[2] in (
                "reporter",
                "timer",
                "console",
                "stopwatch",
            ):
                yield path.name, node.args[0]
            elif function == "_Step" and path.name == "recover.py":
                yield path.name, node.args[1]


def test_every_stage_has_one_of_the_names():
    begun = {
        (module, argument.value if isinstance(argument, ast.Constant) else ast.unparse(argument))
        for module, argument in started_stages()
    }
    passed_on = {("progress.py", "stage"), ("recover.py", "step.stage"), ("stopwatch.py", "stage")}
    assert passed_on < begun
    assert {stage for _, stage in begun - passed_on} == set(STAGES)
