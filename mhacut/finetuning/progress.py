"""Progress of a run: the values that change from step to step, besides the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mhacut.finetuning.result import EpochSummary
from mhacut.measuring.accuracy import Evaluation


@dataclass
class Progress:
    """Progress of a run, the same in every process except for ``unreadable``."""

    step: int = 0
    """Number of steps taken."""
    saved: int | None = None
    """Step of the last save; None before the first."""
    best: float | None = None
    """Best top-1 so far in percent, before training or after an epoch; None before the first measurement."""
    before: Evaluation | None = None
    """Accuracy of the slim file that was read."""
    epoch_loss: float = 0.0
    """Sum of the losses of this epoch's images."""
    epoch_images: int = 0
    """Number of images trained on in this epoch."""
    rows: list[EpochSummary] = field(default_factory=list)
    """Summary of each finished epoch."""
    unreadable: dict[str, None] = field(default_factory=dict)
    """Names of images that could not be read, in order; those of all processes after a save."""

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """Return the progress that :meth:`to_state` described."""
        return cls(
            step=state["step"],
            saved=state["step"],
            best=state["best"],
            before=None if state["before"] is None else Evaluation(**state["before"]),
            epoch_loss=state["epoch_loss"],
            epoch_images=state["epoch_images"],
            rows=[EpochSummary(**row) for row in state["rows"]],
            unreadable=dict.fromkeys(state["unreadable"]),
        )

    @property
    def improved(self) -> bool | None:
        """Whether accuracy after an epoch was better than before training; None if it is not measured."""
        return None if self.before is None or self.best is None else self.best > self.before.top1

    def to_state(self) -> dict[str, Any]:
        """Return plain values that ``torch.save`` keeps and :meth:`from_state` reads."""
        return {
            "step": self.step,
            "best": self.best,
            "epoch_loss": self.epoch_loss,
            "epoch_images": self.epoch_images,
            "rows": self.summary(),
            "before": None if self.before is None else asdict(self.before),
            "unreadable": list(self.unreadable),
        }

    def summary(self) -> list[dict[str, Any]]:
        """Return the lines of ``summary.csv``."""
        return [asdict(row) for row in self.rows]

    def add_step(self, loss: float, images: int) -> None:
        """Count a step with the sum of its losses over ``images``."""
        self.step += 1
        self.epoch_loss += loss
        self.epoch_images += images
