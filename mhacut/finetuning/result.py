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
    epoch: int
    """Index of the epoch, from 0."""
    train_loss: float
    """Mean training loss over the images of the epoch."""
    eval_loss: float | None
    """Cross-entropy on validation images, or without these, the loss on held-out training images."""
    eval_top1: float | None
    """Top-1 accuracy on validation images in percent; None without validation images."""
    eval_top5: float | None
    """Top-5 accuracy on validation images in percent."""
    lr: float
    """Learning rate of the last step of the epoch."""


@dataclass
class Progress:
    """Progress of a fine-tuning run, saved for a resume. Only ``unreadable`` differs between processes."""

    step: int = 0
    start: float | None = None
    """Score of the initial weights: top-1 accuracy in percent, or negative loss on held-out images."""
    best: float | None = None
    """Best score of the run so far; None before the first measurement."""
    before: Evaluation | None = None
    epoch_loss: float = 0.0
    """Sum of the training losses of the images seen in the current epoch."""
    epoch_images: int = 0
    rows: list[EpochSummary] = field(default_factory=list)
    unreadable: dict[str, None] = field(default_factory=dict)
    """Names of unreadable training images, in the order of discovery."""

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        before = None if state["before"] is None else Evaluation(**state["before"])
        return cls(**{**state, "before": before, "rows": [EpochSummary(**row) for row in state["rows"]]})

    @property
    def improved(self) -> bool | None:
        return None if self.start is None or self.best is None else self.best > self.start

    def summary(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]


@dataclass(frozen=True)
class FinetuneResult:
    """Result of :func:`mhacut.finetune`: the written file, accuracy before and after, and speed."""

    folder: Path
    """Folder to which the run was written."""
    output: Path
    """Slim file with the best weights by validation accuracy or held-out loss. If neither was measured, the
    slim file with the last weights."""
    architecture: str
    """timm's name of the dense model's architecture."""
    before: Evaluation | None
    """Accuracy of the input slim file; None without labelled validation images."""
    after: Evaluation | None
    """Accuracy of the slim file ``output``; None without labelled validation images."""
    losses: tuple[float, float] | None
    """Losses of the input file and of ``output`` on held-out images; None if accuracy was measured."""
    epochs: tuple[EpochSummary, ...]
    """Losses, accuracy and learning rate of each epoch."""
    improved: bool | None
    """Whether an epoch had a better score than the input file; None if no score was measured."""
    steps: int
    """Number of training steps in total, including the steps before a resume."""
    flops: int
    data: str
    preprocessing: Preprocessing
    """Preprocessing of the validation images. Training images are also augmented."""
    provenance: Provenance
    """Origin of each value in ``preprocessing``, for example the file or an option."""
    unreadable: tuple[str, ...]
    """Names of training images that could not be read. Other images took their places."""
    images_per_second: float
    """Training images per second of all processes together, without validation and saving."""
    device: str
    processes: int
    seconds: float
    """Wall time of the call in seconds."""

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return a table of the model before and after fine-tuning, as rows of cells. Row 0 is the header."""
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
