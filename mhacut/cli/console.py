"""The only printer: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from mhacut.text import safe

__all__ = ["SCHEMA_VERSION", "Console", "safe", "safe_lines", "table"]

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SCHEMA_VERSION = 1
"""Version of the JSON that every command prints under ``--json``."""


def safe_lines(text: object) -> str:
    """Return ``text`` with each of its lines made safe by :func:`safe`."""
    return "\n".join(map(safe, str(text).split("\n")))


def table(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Return rows in aligned columns; never cut to a width, so that a pipe gets whole names.

    >>> print(table([["", "dense", "slim"], ["FLOPs", "4.61G", "2.00G"]]))
           dense   slim
    FLOPs  4.61G  2.00G

    Args:
        rows: cells, the same number in each; a first row of headings is a row like any other.
        left: so many columns are aligned left, the others right.
    """
    widths = [max(map(_cells, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for number, (cell, width) in enumerate(zip(row, widths, strict=True)):
            room = " " * (width - _cells(cell))
            cells.append(cell + room if number < left else room + cell)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _cells(text: str) -> int:
    """Number of columns that ``text`` takes on a terminal."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


class Console:
    """Shows one command to one user; a :class:`mhacut.runtime.progress.Reporter`.

    Args:
        quiet: show nothing but the result and errors.
        verbose: 0, 1 or 2.
        as_json: the result is one JSON object.
        rank: which of several processes this is; all but the first, 0, print errors only.
    """

    def __init__(
        self, *, quiet: bool = False, verbose: int = 0, as_json: bool = False, rank: int = 0
    ) -> None:
        self.rank = rank
        self.quiet = quiet or rank > 0
        self.verbose = verbose
        self.as_json = as_json
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    # -- result --

    def result(self, text: str, document: Mapping[str, Any]) -> None:
        """Print ``text``, or ``document`` under ``--json``; a reader that went away is no error."""
        self.finish()
        if self.rank > 0:
            return
        if self.as_json:
            text = json.dumps({"schema_version": SCHEMA_VERSION, **document}, allow_nan=False, indent=2)
        try:
            _write(sys.stdout, text)
        except BrokenPipeError:
            # Nobody reads on (``| head``). Python flushes stdout again at its end: give it somewhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    # -- the rest --

    def log(self, message: str) -> None:
        if not self.quiet:
            self.say(safe(message))

    def start(self, stage: str) -> None:
        if self.quiet:
            return
        if self._shows_progress():
            self._start_bar(stage)
        elif self.verbose:
            self.say(safe(stage))

    def advance(self, done: int, total: int, detail: str = "") -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=total or None, detail=safe(detail))

    def finish(self) -> None:
        """Take the progress display off the terminal."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None

    def error(self, text: str) -> None:
        """Print ``text`` whatever the verbosity."""
        self.finish()
        self.say(safe_lines(text if self.rank == 0 else f"process {self.rank}: {text}"))

    def traceback(self) -> None:
        """Print the traceback of the exception that is being handled."""
        import traceback

        self.finish()
        self.say(safe_lines(traceback.format_exc().rstrip()))

    def _shows_progress(self) -> bool:
        return not self.quiet and not self.as_json and sys.stderr.isatty()

    def _start_bar(self, stage: str) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[detail]}", markup=False),
                TimeElapsedColumn(),
                console=RichConsole(stderr=True, markup=False, highlight=False, emoji=False),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._progress.start()
        elif self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(safe(stage), total=None, detail="")

    def say(self, line: str) -> None:
        """Print one line on stderr, above the progress display if there is one."""
        if self._progress is None:
            try:
                _write(sys.stderr, line)
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        else:
            from rich.text import Text

            encoding = sys.stderr.encoding or "ascii"
            self._progress.console.print(Text(_encodable(line, encoding)), soft_wrap=True)


def _write(stream: TextIO, text: str) -> None:
    stream.write(_encodable(text, stream.encoding or "ascii") + "\n")
    stream.flush()


def _encodable(text: str, encoding: str) -> str:
    """Return ``text`` with escapes for characters that the encoding lacks, so that printing cannot fail."""
    return text.encode(encoding, "backslashreplace").decode(encoding)
