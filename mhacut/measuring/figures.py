"""Figures of a model before and after a command."""

from __future__ import annotations

from dataclasses import dataclass

from mhacut.measuring.accuracy import Evaluation


@dataclass(frozen=True)
class ModelFigures:
    """Size, cost and accuracy of a model."""

    flops: int
    parameters: int
    latency_ms: float | None = None
    """Median of interleaved runs, per batch; None when not measured."""
    evaluation: Evaluation | None = None
    """Accuracy on the validation images; None without any."""
    size: int | None = None
    """Bytes of the file, in the dtype of the checkpoint; for the dense model, bytes of its tensors."""
