"""How a long step tells whoever waits; the command line shows it, the library is silent by default."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Told what happens; it never decides anything."""

    def log(self, message: str) -> None:
        """A line worth reading once: what was inferred, what was chosen."""

    def start(self, stage: str) -> None:
        """A stage begins; the one before is over."""

    def advance(self, done: int, total: int, detail: str = "") -> None:
        """The present stage has done ``done`` of ``total``."""


class Silent:
    """A reporter that tells nobody."""

    def log(self, message: str) -> None:
        pass

    def start(self, stage: str) -> None:
        pass

    def advance(self, done: int, total: int, detail: str = "") -> None:
        pass
