"""What a run of fine-tuning tells: a line per epoch, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mhacut.measuring.accuracy import Evaluation


@dataclass(frozen=True)
class EpochSummary:
    """A line of ``summary.csv``."""

    epoch: int
    """From 0."""
    train_loss: float
    """Mean over the images of the epoch, as the weights moved."""
    eval_loss: float | None
    """Cross-entropy on the validation images."""
    eval_top1: float | None
    eval_top5: float | None
    lr: float
    """Of the epoch's last step."""


@dataclass(frozen=True)
class FinetuneResult:
    """What :func:`mhacut.finetune` did."""

    folder: Path
    output: Path
    """The slim file to use: the best on validation images where there are any, else the last."""
    architecture: str
    before: Evaluation | None
    """Of the slim file that was read; None without labelled validation images."""
    after: Evaluation | None
    """Of ``output``, as it was read back."""
    epochs: tuple[EpochSummary, ...]
    steps: int
    flops: int
    """The same before and after."""
    data: str
    """What it was trained on."""
    unreadable: tuple[str, ...]
    """Images that could not be read; others stood in for them."""
    images_per_second: float
    """Over all processes, of the steps of this call, without measuring and saving."""
    device: str
    processes: int
    seconds: float
