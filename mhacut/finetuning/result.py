"""Result of a run of fine-tuning, and its summary by epoch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mhacut.budget import format_flops
from mhacut.checkpoint.provenance import Provenance
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
    """Cross-entropy on the validation images; None, as the accuracies, without them."""
    eval_top1: float | None
    """Top-1 accuracy on them, %."""
    eval_top5: float | None
    """Top-5 accuracy on them, %."""
    lr: float
    """Learning rate of the epoch's last step."""


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
        flops = format_flops(self.flops)
        return [*rows, ("FLOPs", flops, flops, "")]

    def __repr__(self) -> str:
        return safe_table(self.rows(), [f"saved {self.output}", f"trained on {self.data}"])
