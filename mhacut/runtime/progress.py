"""Progress of commands: reporters, times of stages, and a progress bar."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from mhacut.runtime.process import rank
from mhacut.text import safe

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 10.0
"""Seconds between progress lines where no progress bar is shown."""


class Reporter(Protocol):
    """Receives messages and progress of a command."""

    def log(self, message: str) -> None:
        """Receive a message about a choice that the command made."""

    def start(self, stage: str) -> None:
        pass

    def advance(self, done: int, total: int, detail: str = "") -> None:
        """Receive the progress of the current stage. ``total`` is 0 if unknown."""


class Silent:
    def log(self, message: str) -> None:
        pass

    def start(self, stage: str) -> None:
        pass

    def advance(self, done: int, total: int, detail: str = "") -> None:
        pass


SILENT: Reporter = Silent()


class StageTimer:
    """Reporter that measures the duration of each stage and passes all calls to another reporter."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.seconds: dict[str, float] = {}
        """Seconds of the completed stages. Repeated stages add up."""
        self._stage: str | None = None
        self._began = 0.0

    def log(self, message: str) -> None:
        self.reporter.log(message)

    def start(self, stage: str) -> None:
        self.stop()
        self._stage, self._began = stage, time.perf_counter()
        self.reporter.start(stage)

    def advance(self, done: int, total: int, detail: str = "") -> None:
        self.reporter.advance(done, total, detail)

    def stop(self) -> None:
        if self._stage is not None:
            spent = time.perf_counter() - self._began
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + spent
            self._stage = None

    def taken(self) -> dict[str, float]:
        """End the current stage, return the seconds of each stage, and forget them."""
        self.stop()
        seconds, self.seconds = self.seconds, {}
        return seconds


class Counter:
    def __init__(self, reporter: Reporter, total: int) -> None:
        self.reporter, self.total, self.done = reporter, total, 0

    def add(self, pieces: int) -> None:
        self.done += pieces
        self.reporter.advance(self.done, self.total)


class StageDisplay(Silent):
    """Reporter that shows progress on stderr, as a bar in terminals, else as lines. It prints no messages."""

    def __init__(self, say: Callable[[str], None] | None = None, every: float | None = None) -> None:
        from rich import progress  # takes as long to import as a short command
        from rich.console import Console

        self._say, self._every = say, SECONDS_BETWEEN_LINES if every is None else every
        self._elapsed, self._remaining = progress.TimeElapsedColumn(), progress.TimeRemainingColumn()
        self._progress = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=20),
            progress.TextColumn("{task.fields[detail]}", markup=False),
            self._elapsed,
            progress.TextColumn("elapsed"),
            self._remaining,
            progress.TextColumn("{task.fields[left]}"),
            console=Console(stderr=True, markup=False, highlight=False, emoji=False),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=say is not None,
        )
        self._task = self._progress.add_task("", total=None, detail="", left="")
        self._shown = 0.0
        self._progress.start()

    @property
    def console(self) -> Console:
        """Rich console whose output appears above the bar."""
        return self._progress.console

    def start(self, stage: str) -> None:
        # A new task, because rich estimates the remaining time from the speed of one task.
        self._progress.remove_task(self._task)
        self._task = self._progress.add_task(safe(stage), total=None, detail="", left="")
        self._shown = time.perf_counter()

    def advance(self, done: int, total: int, detail: str = "") -> None:
        state = ", ".join(part for part in (f"{done}/{total}" if total else "", safe(detail)) if part)
        left = "left" if total else ""
        self._progress.update(self._task, completed=done, total=total or None, detail=state, left=left)
        if self._say is not None and time.perf_counter() - self._shown >= self._every:
            self._shown = time.perf_counter()
            (task,) = self._progress.tasks
            elapsed, remaining = self._elapsed.render(task), self._remaining.render(task)
            self._say(f"{task.description}: {state}, {elapsed} elapsed, {remaining} left")

    def close(self) -> None:
        if self._say is None:  # some versions of rich end a disabled bar with an empty line
            self._progress.stop()


@dataclass(frozen=True, kw_only=True)
class Reporting:
    """Keyword arguments of functions that report progress, for :func:`reporting`."""

    progress: bool | None = None
    reporter: Reporter | None = None


@contextmanager
def reporting(reporter: Reporter | None, progress: bool | None) -> Iterator[Reporter]:
    """Yield ``reporter``, or else a progress bar, or else a silent reporter.

    ``progress`` shows or hides the bar. By default, terminals and notebooks have a bar.
    """
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    widgets = getattr(shell, "kernel", None) is not None and bool(importlib.util.find_spec("ipywidgets"))
    bar = widgets or (sys.stderr is not None and sys.stderr.isatty())
    if reporter is not None or progress is False or not (bar or progress) or rank() > 0:
        yield reporter or SILENT
        return
    display = StageDisplay(None if bar else partial(print, file=sys.stderr))
    try:
        yield display
    finally:
        display.close()
