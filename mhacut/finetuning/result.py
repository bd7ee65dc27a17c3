"""Progress and result of a fine-tuning run."""

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
    """A line of ``summary.csv``."""

    epoch: int
    """Number of the epoch, from 0."""
    train_loss: float
    """Mean training loss over the images of the epoch."""
    eval_loss: float | None
    """Cross-entropy on validation images; without them, the loss on held-out training images."""
    eval_top1: float | None
    """Top-1 accuracy on validation images in percent; None without them."""
    eval_top5: float | None
    """Top-5 accuracy on validation images in percent."""
    lr: float
    """Learning rate of the last step of the epoch."""


@dataclass
class Progress:
    """Progress of a run besides its weights. Only ``unreadable`` differs between processes."""

    step: int = 0
    """Number of completed steps."""
    start: float | None = None
    """Score of the initial weights, by :func:`mhacut.finetuning.held_out.measured_score`."""
    best: float | None = None
    """Best score so far; None before the first measurement."""
    before: Evaluation | None = None
    """Accuracy of the initial weights."""
    epoch_loss: float = 0.0
    """Sum of losses over the images of the current epoch."""
    epoch_images: int = 0
    """Number of training images in the current epoch so far."""
    rows: list[EpochSummary] = field(default_factory=list)
    """Summary of each completed epoch."""
    unreadable: dict[str, None] = field(default_factory=dict)
    """Names of unreadable images in order; after a save, those of all processes."""

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        before = None if state["before"] is None else Evaluation(**state["before"])
        return cls(**{**state, "before": before, "rows": [EpochSummary(**row) for row in state["rows"]]})

    @property
    def improved(self) -> bool | None:
        return None if self.start is None or self.best is None else self.best > self.start

    def summary(self) -> list[dict[str, Any]]:
        """Return the lines of ``summary.csv``."""
        return [asdict(row) for row in self.rows]


@dataclass(frozen=True)
class FinetuneResult:
    """Result of :func:`mhacut.finetune`: the written file, accuracy before and after, and speed."""

    folder: Path
    """Folder of the run."""
    output: Path
    """Slim file to use: the best weights by validation images or held-out images, else the last weights."""
    architecture: str
    """timm's name of the dense model."""
    before: Evaluation | None
    """Accuracy of the input file; None without labelled validation images."""
    after: Evaluation | None
    """Accuracy of ``output``, measured after reading the file."""
    losses: tuple[float, float] | None
    """Loss of the input file and of ``output`` on held-out training images; None if accuracy was measured."""
    epochs: tuple[EpochSummary, ...]
    """Summary of each epoch."""
    improved: bool | None
    """Whether an epoch was better than the input file; None if it was not measured."""
    steps: int
    """Number of steps in total, including steps before a resume."""
    flops: int
    data: str
    preprocessing: Preprocessing
    """Preprocessing of the validation images. Training adds augmentation."""
    provenance: Provenance
    """Origin of each value in ``preprocessing``."""
    unreadable: tuple[str, ...]
    """Unreadable images that others replaced."""
    images_per_second: float
    """Training speed of this call over all processes, without validation and saving."""
    device: str
    processes: int
    """Number of processes."""
    seconds: float
    """Duration of this call."""

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return the cells of a table of the model before and after, header first."""
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
