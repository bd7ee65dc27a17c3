"""Progress of commands, passed on to the part that shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from mhacut.runtime.stages import StageClock, StageShare


class Reporter(Protocol):
    """Receives what a command does; decides nothing."""

    def log(self, message: str) -> None:
        """Take a message worth reading once: something inferred, chosen or left out."""

    def start(self, stage: str) -> None:
        """Begin a stage, one of :data:`mhacut.runtime.stages.STAGES`; the one before is over."""

    def advance(self, done: int, total: int, detail: str = "") -> None:
        """Receive the state of the current stage: ``done`` of ``total``."""


@runtime_checkable
class Estimator(Protocol):
    """A reporter that estimates what is left."""

    def expect(self, shares: Sequence[StageShare]) -> None:
        """Take the stages of the command in their order, and their shares of its time."""


def expect(reporter: Reporter, shares: Sequence[StageShare]) -> None:
    """Give the stages of a command to ``reporter``, if it estimates what is left."""
    if isinstance(reporter, Estimator):
        reporter.expect(shares)


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
        self._clock = StageClock()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage; of one that was run twice, both together."""
        return self._clock.seconds

    def expect(self, shares: Sequence[StageShare]) -> None:
        expect(self.reporter, shares)

    def log(self, message: str) -> None:
        self.reporter.log(message)

    def start(self, stage: str) -> None:
        self._clock.start(stage)
        self.reporter.start(stage)

    def advance(self, done: int, total: int, detail: str = "") -> None:
        self.reporter.advance(done, total, detail)

    def taken(self) -> dict[str, float]:
        """End the current stage; return the seconds of all stages, and begin to count anew."""
        self.stop()
        seconds, self._clock = self.seconds, StageClock()
        return seconds

    def stop(self) -> None:
        """End the current stage."""
        self._clock.stop()


class Counter:
    """Counter of the parts of one stage that are done."""

    def __init__(self, reporter: Reporter, total: int) -> None:
        self.reporter, self.total, self.done = reporter, total, 0

    def add(self, pieces: int) -> None:
        """Report that ``pieces`` more are done."""
        self.done += pieces
        self.reporter.advance(self.done, self.total)
