"""The header of a checkpoint: names, shapes and dtypes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

Format = Literal["safetensors", "torch"]


MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""


DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Supported dtypes by their names in safetensors files."""
MAX_CONFIG_BYTES = 4 * 2**20
FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the file announces it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class FileHeader:
    """What a checkpoint holds, known without reading its weights."""

    path: Path
    """The file with the weights."""
    format: Format
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of a safetensors file; untrusted text."""
    config: Mapping[str, Any] | None = None
    """The ``config.json`` of a timm folder; untrusted."""
    part: str | None = None
    """Which part of a training checkpoint the tensors are (``model_ema``), as timm picks it."""
    prefix_stripped: bool = False
    """Names carried ``module.`` or ``_orig_mod.`` of a wrapper."""
    has_yacs_config: bool = False
    """A training checkpoint with a yacs configuration beside the weights, as those of Swin have."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Per tensor name."""
        return {name: info.shape for name, info in self.tensors.items()}
