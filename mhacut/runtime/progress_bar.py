"""The progress of a command as one bar, on a terminal or in a notebook, or as a line now and then."""

from __future__ import annotations

import html
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from mhacut.runtime.launch import believed, rank
from mhacut.runtime.progress import SILENT, Reporter
from mhacut.runtime.stages import Snapshot, StageClock, StageShare, clock
from mhacut.text import safe

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_CHECKS = 1.0
"""Time after which a thread looks again whether a line is due."""
_SECONDS_BETWEEN_UPDATES = 0.25
"""Least time between updates of a notebook: each is a message to its page."""


class View(Protocol):
    """Shows the state of a command."""

    def start(self, state: Snapshot) -> None:
        """Show that a stage begins."""

    def show(self, state: Snapshot) -> None:
        """Show how far the stage is."""

    def close(self) -> None:
        """Show no more."""


class TerminalView:
    """A bar on stderr, taken off at the end."""

    def __init__(self) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=RichConsole(stderr=True, markup=False, highlight=False, emoji=False, force_jupyter=False),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("", total=None, detail="", left="")
        self._progress.start()

    @property
    def console(self) -> RichConsole:
        """Console to print on above the bar."""
        return self._progress.console

    def start(self, state: Snapshot) -> None:
        self.show(state)

    def show(self, state: Snapshot) -> None:
        fraction = state.fraction
        self._progress.update(
            self._task,
            description=safe(state.stage),
            completed=fraction or 0.0,
            total=None if fraction is None else 1.0,
            detail=safe(state.detail or _count(state)),
            left="" if state.left is None else f"about {clock(state.left)} left",
        )

    def close(self) -> None:
        self._progress.stop()


class NotebookView:
    """A bar in the output of a notebook's cell, emptied at the end; needs no widgets."""

    def __init__(self) -> None:
        from IPython.display import display

        self._handle: Any = display(_Html(""), display_id=True)
        self._shown = 0.0

    def start(self, state: Snapshot) -> None:
        self._update(state)

    def show(self, state: Snapshot) -> None:
        if time.perf_counter() - self._shown >= _SECONDS_BETWEEN_UPDATES:
            self._update(state)

    def close(self) -> None:
        self._handle.update(_Html(""))

    def _update(self, state: Snapshot) -> None:
        self._shown = time.perf_counter()
        value = "" if state.fraction is None else f' value="{state.fraction:.3f}"'
        self._handle.update(_Html(f"<progress{value}></progress> {html.escape(safe(state.line))}"))


class _Html:
    """Text that notebooks show as HTML; elsewhere, and in a diff, it is short."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return "mhacut"

    def _repr_html_(self) -> str:
        return self._text


class LinesView:
    """A line every few seconds, for stages that take longer than that.

    A thread writes them where a stage has no news for long: silence looks like a hang.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._last = self._seen = 0.0
        self._state: Snapshot | None = None
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, state: Snapshot) -> None:
        with self._lock:
            self._state, self._last = state, time.perf_counter()
            self._seen = self._last
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_on, daemon=True)
            self._thread.start()

    def show(self, state: Snapshot) -> None:
        with self._lock:
            self._state, self._seen = state, time.perf_counter()
            self._write_when_due()

    def close(self) -> None:
        with self._lock:
            self._closed.set()
        if self._thread is not None:
            self._thread.join(_SECONDS_BETWEEN_CHECKS)

    def _write_on(self) -> None:
        while not self._closed.wait(_SECONDS_BETWEEN_CHECKS):
            with self._lock:
                if not self._closed.is_set():
                    self._write_when_due()

    def _write_when_due(self) -> None:
        now = time.perf_counter()
        if self._state is not None and now - self._last >= SECONDS_BETWEEN_LINES:
            self._last, passed = now, now - self._seen
            left = None if self._state.left is None else self._state.left - passed
            left = None if left is None or left < 1 else left  # it takes longer than was estimated
            self._say(safe(replace(self._state, elapsed=self._state.elapsed + passed, left=left).line))


class ProgressBar:
    """A reporter that shows the progress of one command in a view, and no messages."""

    def __init__(self, view: View) -> None:
        self._clock, self._view = StageClock(), view

    def expect(self, shares: Sequence[StageShare]) -> None:
        self._clock.expect(shares)

    def log(self, message: str) -> None:
        pass

    def start(self, stage: str) -> None:
        self._clock.start(stage)
        self._view.start(self._clock.snapshot())

    def advance(self, done: int, total: int, detail: str = "") -> None:
        self._clock.advance(done, total, detail)
        self._view.show(self._clock.snapshot())


@contextmanager
def reporting(reporter: Reporter | None, progress: bool | None) -> Iterator[Reporter]:
    """Give the reporter of a call from Python: ``reporter``, else a bar, else a silent one.

    Args:
        reporter: given by the caller; shows everything itself.
        progress: whether to show a bar, or lines where there is neither a notebook nor a terminal; None for
            a bar in notebooks and on terminals only.
    """
    view = None if reporter is not None else _view(progress)
    if view is None:
        yield reporter or SILENT
        return
    try:
        yield ProgressBar(view)
    finally:
        view.close()


def _view(progress: bool | None) -> View | None:
    if progress is False or believed(rank) > 0:
        return None
    if in_notebook():
        return NotebookView()
    if sys.stderr is not None and sys.stderr.isatty():
        return TerminalView()
    return LinesView(_to_stderr) if progress else None


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def in_notebook() -> bool:
    """Whether Python runs in the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


def _count(state: Snapshot) -> str:
    return f"{state.done}/{state.total}" if state.total else ""
