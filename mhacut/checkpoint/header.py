"""Header of a checkpoint: names, shapes and dtypes of its tensors, known without reading them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mhacut.checkpoint.wrapping import Naming

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
"""Supported dtypes by their names in safetensors files."""
FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor, as the file announces them."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """Return shape and dtype of each tensor."""
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class FileHeader:
    """Everything a file says about its tensors, and how it was found."""

    path: Path
    """The file with the weights."""
    format: Format
    tensors: Mapping[str, TensorInfo]
    """Tensors of the model, by their names in it."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Metadata of a safetensors file; untrusted text."""
    config: Mapping[str, Any] | None = None
    """The ``config.json`` of a folder of timm or another library; untrusted."""
    preprocessor: Mapping[str, Any] | None = None
    """The ``preprocessor_config.json`` of a folder of transformers; untrusted."""
    shards: Mapping[Path, Mapping[str, TensorInfo]] = field(default_factory=dict)
    """Files over which the tensors are spread, with the tensors of each; empty if ``path`` has all."""
    naming: Naming = field(default_factory=lambda: Naming({}))
    """Names of ``tensors`` in the file."""
    part: str | None = None
    """Entry of a training checkpoint that holds the tensors (``model_ema``)."""
    other_parts: tuple[str, ...] = ()
    """Entries that hold other weights of the network, for the option ``part``."""
    requested_part: str | None = None
    """Part that the user asked for: such an entry, or a module in it."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Entries of a training checkpoint that may state its model, untrusted values of any type; see
    :mod:`mhacut.checkpoint.training`."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of each tensor."""
        return {name: info.dtype for name, info in self.tensors.items()}
