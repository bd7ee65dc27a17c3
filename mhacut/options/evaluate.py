"""Options of ``mhacut evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, field

from mhacut.options.base import CheckpointOptions, LabelledImages, PreprocessingOptions, require


@dataclass(frozen=True)
class EvaluateOptions(CheckpointOptions):
    """Everything ``mhacut evaluate`` can be told."""

    batch_size: int = 64
    """Images at a time."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:N``."""
    amp: bool = False
    """bfloat16 autocast."""
    data: LabelledImages = field(default_factory=LabelledImages)
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)

    def __post_init__(self) -> None:
        require("--batch-size", self.batch_size, self.batch_size >= 1, "at least 1")
