"""Header of a checkpoint: names, shapes and dtypes, read without the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Format = Literal["safetensors", "torch"]

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
FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


def infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def on_meta(tensors: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    return {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in tensors.items()}


@dataclass(frozen=True)
class FileHeader:
    path: Path
    format: Format
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    preprocessor: Mapping[str, Any] | None = None
    shards: Mapping[Path, Mapping[str, TensorInfo]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    """Tensor names in the file, mapped to names in the model. Only these tensors are read."""
    note: str | None = None
    """Line for the log: the entry of the file that was read, and the tensors that were ignored."""
    part: str | None = None
    """Entry of a training checkpoint that was read, for example ``model_ema``; None without entries."""
    other_parts: tuple[str, ...] = ()
    """Other entries of the training checkpoint that hold weights. ``--part`` selects one of them."""
    requested_part: str | None = None
    """Value of ``--part``: an entry of the training checkpoint, or a module inside the entry."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Options that a training script saved in the file, untrusted. See :mod:`mhacut.checkpoint.training`."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: info.dtype for name, info in self.tensors.items()}
