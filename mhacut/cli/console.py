"""The only printer: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from mhacut.cli.streams import give_up
from mhacut.runtime.progress import SILENT, StageDisplay, StageTimer
from mhacut.text import safe, table

__all__ = ["SCHEMA_VERSION", "Console", "safe", "safe_lines", "table"]

SCHEMA_VERSION = 1
"""Version of the JSON that every command prints under ``--json``."""


def safe_lines(text: object) -> str:
    """Return ``text`` with each of its lines made safe by :func:`safe`."""
    return "\n".join(map(safe, str(text).split("\n")))


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
        self._timer = StageTimer(SILENT)
        self._display: StageDisplay | None = None
        self._has_bar = False

    # -- result --

    def result(self, text: str, document: Mapping[str, Any]) -> None:
        """Print ``text``, or ``document`` under ``--json``; a reader that went away is no error.

        The seconds of each stage are added to ``document``, and shown with ``-v``.
        """
        self.finish()
        if self.rank > 0:
            return
        seconds = self._timer.seconds
        if self.verbose and not self.quiet:
            rows = [[stage, f"{spent:.1f} s"] for stage, spent in seconds.items()]
            self.say(table([*rows, ["all stages", f"{sum(seconds.values()):.1f} s"]]))
        if self.as_json:
            document = {"schema_version": SCHEMA_VERSION, **document, "stage_seconds": seconds}
            text = json.dumps(document, allow_nan=False, indent=2)
        try:
            _write(sys.stdout, text)
        except BrokenPipeError:
            give_up(sys.stdout)

    # -- the rest --

    def log(self, message: str) -> None:
        if not self.quiet:
            self.say(safe(message))

    def start(self, stage: str) -> None:
        self._timer.start(stage)
        if self.quiet:
            return
        if self._display is None:
            self._has_bar = not self.as_json and sys.stderr.isatty()
            self._display = StageDisplay(None if self._has_bar else self.say)
        if self.verbose and not self._has_bar:
            self.say(safe(stage))
        self._display.start(stage)

    def advance(self, done: int, total: int, detail: str = "") -> None:
        if self._display is not None:
            self._display.advance(done, total, detail)

    def finish(self) -> None:
        """End the last stage, and take the bar off the terminal."""
        self._timer.stop()
        if self._display is not None:
            self._display.close()
            self._display, self._has_bar = None, False

    def error(self, text: str) -> None:
        """Print ``text`` whatever the verbosity."""
        self.finish()
        self.say(safe_lines(text if self.rank == 0 else f"process {self.rank}: {text}"))

    def traceback(self) -> None:
        """Print the traceback of the exception that is being handled."""
        import traceback

        self.finish()
        self.say(safe_lines(traceback.format_exc().rstrip()))

    def say(self, line: str) -> None:
        """Print one line on stderr, above the bar if there is one."""
        if self._display is None or not self._has_bar:
            _write(sys.stderr, line)
        else:
            from rich.text import Text

            encoding = sys.stderr.encoding or "ascii"
            self._display.console.print(Text(_encodable(line, encoding)), soft_wrap=True)


def _write(stream: TextIO, text: str) -> None:
    stream.write(_encodable(text, stream.encoding or "ascii") + "\n")
    stream.flush()


def _encodable(text: str, encoding: str) -> str:
    """Return ``text`` with escapes for characters that the encoding lacks, so that printing cannot fail."""
    return text.encode(encoding, "backslashreplace").decode(encoding)
