"""Stages of commands, with one name each on the bar, with ``-v`` and in JSON; and the time they take."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STAGES: Mapping[str, str] = {
    "starting": "importing torch and timm",
    "reading": "the checkpoint, and finding what of it can be cut",
    "timing layers": "of each shape; of whole models if tokens may be merged; for a budget of time",
    "loading images": "to calibrate on",
    "checking the preprocessing": "whether another usual normalisation is clearly more accurate",
    "evaluating": "accuracy on labelled images",
    "calibrating": "Fisher information and second moments of channels",
    "ranking channels": "in which order channels go",
    "measuring sensitivity curves": "the divergence that each width would cost",
    "choosing merges": "how many tokens each block merges",
    "searching": "training indicators",
    "swapping channels": "exchanging kept channels for better ones",
    "repairing": "least squares on the dense model's activations",
    "cutting": "slicing, and checking that masked and sliced model agree",
    "repairing in order": "least squares on the pruned model's activations",
    "reweighting": "training a scale per kept channel",
    "healing": "training each block to give the dense one's output",
    "tuning": "training all weights on the calibration images",
    "writing": "the slim file, and reading it back",
    "comparing": "outputs of two models",
    "timing": "latency",
    "reporting": "the HTML page",
    "training": "steps of fine-tuning",
    "looking at heads": "cost, similarity and rank of each",
    "building models": "those of timm, without weights",
    "preparing": "counting FLOPs and compiling",
    "exporting": "for another program",
    "quantizing": "to INT8",
    "pushing": "to the hub",
}
"""Every stage of every command, with a description. The same work has the same name in all commands."""


_ENOUGH = 0.05
"""Share of a command that must be done before later stages are estimated; a smaller share may be all
overhead."""


@dataclass(frozen=True)
class StageShare:
    """Share of one stage in the time of a command."""

    stage: str
    share: float
    """Time of all its visits together; only ratios between stages matter."""
    visits: int = 1
    """Number of times that the stage starts from its beginning; continuing it is not a new visit."""
    done: float = 0.0
    """Fraction that an earlier run did: its progress counts it, its seconds do not."""


@dataclass(frozen=True)
class Snapshot:
    """State of a command."""

    stage: str
    done: int
    """Number of the stage's parts that are done."""
    total: int
    """Number of its parts; 0 where nobody knows."""
    detail: str
    elapsed: float
    """Seconds since the command began."""
    left: float | None
    """Estimate of the seconds until it ends; None while there is none."""

    @property
    def fraction(self) -> float | None:
        """Part of the command's time that has passed, 0..1; None while nobody knows."""
        if self.left is None or self.elapsed + self.left <= 0:
            return None
        return self.elapsed / (self.elapsed + self.left)

    @property
    def line(self) -> str:
        """The state in one line: ``healing: 120 of 480 (25 %), 1:02 elapsed, about 2:10 left``."""
        parts = [f"{self.done} of {self.total} ({100 * self.done // self.total} %)"] if self.total else []
        parts += [self.detail] if self.detail else []
        parts.append(f"{clock(self.elapsed)} elapsed")
        parts += [] if self.left is None else [f"about {clock(self.left)} left"]
        return f"{self.stage}: {', '.join(parts)}"


def clock(seconds: float) -> str:
    """Return a duration as people write it.

    >>> clock(75.4), clock(3600 + 62)
    ('1:15', '1:01:02')
    """
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class StageClock:
    """Seconds of each stage, and an estimate of what is left of the command.

    The remaining time of the current stage follows from its own speed. The time of a later stage is its share
    times the seconds per share of the stages before it.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._began = time.perf_counter()
        self._stage: str | None = None
        self._stage_began = self._began
        self._shares: dict[str, StageShare] = {}
        self._visits: dict[str, int] = {}
        self._fractions: dict[str, float] = {}
        self._last = (0, 0, "")

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage so far; of one that was run twice, both together."""
        found = dict(self._seconds)
        if self._stage is not None:
            found[self._stage] = found.get(self._stage, 0.0) + time.perf_counter() - self._stage_began
        return found

    def expect(self, shares: Sequence[StageShare]) -> None:
        """Take the stages that are to come or were, in their order."""
        self._shares = {share.stage: share for share in shares}

    def start(self, stage: str) -> None:
        """Begin a stage; the one before is over."""
        self.stop()
        self._stage, self._stage_began, self._last = stage, time.perf_counter(), (0, 0, "")

    def advance(self, done: int, total: int, detail: str = "") -> None:
        """Take the state of the current stage: ``done`` of ``total``."""
        self._last = (done, total, detail)
        if self._stage is not None and total > 0:
            self._fractions[self._stage] = min(done / total, 1.0)

    def stop(self) -> None:
        """End the current stage."""
        if self._stage is None:
            return
        stage, self._seconds, self._stage = self._stage, self.seconds, None
        # One that did not come to its end will go on there: steps of training between measurements.
        if self._fractions.get(stage, 1.0) >= 1.0:
            self._fractions.pop(stage, None)
            self._visits[stage] = self._visits.get(stage, 0) + 1

    def snapshot(self) -> Snapshot:
        """Return the state of the command."""
        elapsed = time.perf_counter() - self._began
        return Snapshot(self._stage or "", *self._last, elapsed=elapsed, left=self.left())

    def left(self) -> float | None:
        """Estimate the seconds until the command ends; None while there is no basis for an estimate."""
        seconds = self.seconds
        order = list(self._shares)
        reached = max((number for number, stage in enumerate(order) if stage in seconds), default=-1)
        known = {stage: self._gained(stage) for stage in order if stage in seconds}
        passed = sum(self._shares[stage].share * part for stage, part in known.items())
        spent = sum(seconds[stage] for stage, part in known.items() if part > 0)
        left = 0.0
        for number, (stage, share) in enumerate(self._shares.items()):
            if number < reached and (share.visits == 1 or stage not in known):
                continue  # it is over, or was left out
            part = known.get(stage, 0.0)
            if part > 0:
                left += seconds[stage] * ((1 - share.done) / part - 1)
            elif passed >= _ENOUGH * sum(share.share for share in self._shares.values()):
                left += max((1 - share.done) * share.share * spent / passed - seconds.get(stage, 0.0), 0.0)
            else:
                return None
        return left if known else None

    def _gained(self, stage: str) -> float:
        """Fraction of all visits of a stage that was done since the clock was started."""
        share = self._shares[stage]
        done = self._visits.get(stage, 0) + self._fractions.get(stage, 0.0)
        return max(min(done / share.visits, 1.0) - share.done, 0.0)
