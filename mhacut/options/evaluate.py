"""Options of ``mhacut evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, field

from mhacut.options.base import CheckpointOptions, DeviceOptions, LabelledImages, PreprocessingOptions
from mhacut.options.option import option


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(CheckpointOptions, DeviceOptions):
    """Options of ``mhacut evaluate``."""

    batch_size: int = option(64, "Images per batch.", panel="Computing", metavar="N", short="-b", at_least=1)
    amp: bool = option(False, "Compute under bfloat16 autocast.", panel="Computing")
    data: LabelledImages = field(default_factory=LabelledImages)
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)
