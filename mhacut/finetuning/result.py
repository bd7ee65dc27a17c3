"""Progress of a run of fine-tuning, its summary by epoch, and its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mhacut.budget import format_flops
from mhacut.checkpoint.preprocessing import Provenance
from mhacut.data import Preprocessing
from mhacut.measuring.accuracy import Evaluation
from mhacut.text import safe_table


@dataclass(frozen=True)
class EpochSummary:
    """One line of ``summary.csv``."""

    epoch: int
    """Number of the epoch, from 0."""
    train_loss: float
    """Mean loss over the images of the epoch, each computed in its step."""
    eval_loss: float | None
    """Cross-entropy on the validation images; loss on held-out training images without any."""
    eval_top1: float | None
    """Top-1 accuracy on validation images, %; None without any."""
    eval_top5: float | None
    """Top-5 accuracy on them, %."""
    lr: float
    """Learning rate of the epoch's last step."""


@dataclass
class Progress:
    """Progress of a run besides its weights, the same in every process except for ``unreadable``."""

    step: int = 0
    """Number of steps taken."""
    saved: int | None = None
    """Step of the last save; None before the first."""
    scheduled: int = 0
    """Step that the schedule of the learning rate began at: not 0 once a finished run is prolonged."""
    start: float | None = None
    """Score of the weights that were read; see :func:`mhacut.finetuning.judge.measured_score`."""
    best: float | None = None
    """Best score so far, before training or after an epoch; None before the first measurement."""
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
        """Return the progress that ``dataclasses.asdict`` described."""
        before = None if state["before"] is None else Evaluation(**state["before"])
        return cls(**{**state, "before": before, "rows": [EpochSummary(**row) for row in state["rows"]]})

    @property
    def improved(self) -> bool | None:
        """Whether the score after an epoch was better than before training; None if it is not measured."""
        return None if self.start is None or self.best is None else self.best > self.start

    def summary(self) -> list[dict[str, Any]]:
        """Return the lines of ``summary.csv``."""
        return [asdict(row) for row in self.rows]

    def add_step(self, loss: float, images: int) -> None:
        """Count a step with the sum of its losses over ``images``."""
        self.step += 1
        self.epoch_loss += loss
        self.epoch_images += images


@dataclass(frozen=True)
class FinetuneResult:
    """Result of :func:`mhacut.finetune`: the file to use, accuracy before and after, and speed."""

    folder: Path
    """Directory of the run."""
    output: Path
    """The slim file to use: the best on validation images, or the last if there are none. If no epoch
    improved the accuracy, it holds the weights that were read; see :attr:`improved`."""
    architecture: str
    """timm's name of the dense model."""
    before: Evaluation | None
    """Accuracy of the slim file that was read; None without labelled validation images."""
    after: Evaluation | None
    """Accuracy of ``output``, measured on the file as read back."""
    losses: tuple[float, float] | None
    """Loss on held-out training images of the file that was read and of ``output``; None where accuracy was
    measured, or nothing was."""
    epochs: tuple[EpochSummary, ...]
    """Summary of each epoch."""
    improved: bool | None
    """Whether an epoch was better than the file that was read; None without validation images."""
    steps: int
    """Number of steps, those before the run was resumed included."""
    flops: int
    """FLOPs of the model, which training does not change."""
    data: str
    """Description of the training images."""
    preprocessing: Preprocessing
    """Preprocessing of the validation images; that of training adds augmentation."""
    provenance: Provenance
    """Origin of each value in ``preprocessing``."""
    unreadable: tuple[str, ...]
    """Images that could not be read and were replaced by others."""
    images_per_second: float
    """Training speed of this call, over all processes, without measuring and saving."""
    device: str
    processes: int
    """Number of processes."""
    seconds: float
    """Time that this call took."""

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return the cells of a table that compares the model before and after, headings first."""
        rows = [(self.architecture, "before", "after", "")]
        if self.before is not None and self.after is not None:
            best = " (best epoch)" if len(self.epochs) > 1 and self.improved else ""
            before, after = self.before.top1, self.after.top1
            change = f"{after - before:+.2f}"
            rows.append((f"{self.after.label}{best}", f"{before:.2f}", f"{after:.2f}", change))
        if self.losses is not None:
            before, after = self.losses
            rows.append(("loss, held-out images", f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"))
        flops = format_flops(self.flops)
        return [*rows, ("FLOPs", flops, flops, "")]

    def __repr__(self) -> str:
        return safe_table(self.rows(), [f"saved {self.output}", f"trained on {self.data}"])
