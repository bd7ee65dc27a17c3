"""Progress of long commands; the command line shows it, the library is silent by default."""

from __future__ import annotations

import time
from typing import Protocol


class Reporter(Protocol):
    """Receives what a command does; decides nothing."""

    def log(self, message: str) -> None:
        """Take a message worth reading once: something inferred, chosen or left out."""

    def start(self, stage: str) -> None:
        """Begin a stage; the one before is over."""

    def advance(self, done: int, total: int, detail: str = "") -> None:
        """Take the state of the current stage: ``done`` of ``total``."""


class Silent:
    """A reporter that shows nothing."""

    def log(self, message: str) -> None:
        pass

    def start(self, stage: str) -> None:
        pass

    def advance(self, done: int, total: int, detail: str = "") -> None:
        pass


SILENT: Reporter = Silent()


class StageTimer:
    """A reporter that passes everything on and measures how long each stage takes."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.seconds: dict[str, float] = {}
        """Seconds of each stage that is over; of one that was run twice, both together."""
        self._stage: tuple[str, float] | None = None

    def log(self, message: str) -> None:
        self.reporter.log(message)

    def start(self, stage: str) -> None:
        self.stop()
        self._stage = (stage, time.perf_counter())
        self.reporter.start(stage)

    def advance(self, done: int, total: int, detail: str = "") -> None:
        self.reporter.advance(done, total, detail)

    def taken(self) -> dict[str, float]:
        """End the current stage; return the seconds of all stages, and begin to count anew."""
        self.stop()
        seconds, self.seconds = self.seconds, {}
        return seconds

    def stop(self) -> None:
        """End the current stage."""
        if self._stage is not None:
            stage, began = self._stage
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began
            self._stage = None


class Counter:
    """The state of one stage whose parts are done piece by piece."""

    def __init__(self, reporter: Reporter, total: int) -> None:
        self.reporter, self.total, self.done = reporter, total, 0

    def add(self, pieces: int) -> None:
        """Report that ``pieces`` more are done."""
        self.done += pieces
        self.reporter.advance(self.done, self.total)
