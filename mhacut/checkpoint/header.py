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


DTYPES: dict[str, tuple[torch.dtype, int]] = {
    "F64": (torch.float64, 8),
    "F32": (torch.float32, 4),
    "F16": (torch.float16, 2),
    "BF16": (torch.bfloat16, 2),
    "I64": (torch.int64, 8),
    "I32": (torch.int32, 4),
    "I16": (torch.int16, 2),
    "I8": (torch.int8, 1),
    "U8": (torch.uint8, 1),
    "BOOL": (torch.bool, 1),
}
MAX_CONFIG_BYTES = 4 * 2**20
FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


PLAIN_DTYPES = tuple(dtype for dtype, _ in DTYPES.values())


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
