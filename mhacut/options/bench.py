"""Options of ``mhacut bench``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mhacut.options.base import ExportDtype, Flat, PathLike, require, require_choice

Runtime = Literal["eager", "compile", "onnx"]


@dataclass(frozen=True)
class BenchOptions(Flat):
    """Everything ``mhacut bench`` can be told."""

    checkpoints: tuple[PathLike, ...]
    """What ``mhacut prune`` reads or writes; the first is what the others are compared with."""
    model: str | None = None
    """timm architecture of bare checkpoints."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for that architecture, ``{"img_size": 32}``."""
    runtime: Runtime = "eager"
    """``eager``, ``compile`` for torch.compile, ``onnx`` for ONNX Runtime."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Images at a time."""
    seconds: float = 5.0
    """Per batch size, for all checkpoints together."""
    threads: int | None = None
    """On CPUs; None is torch's own choice."""
    dtype: ExportDtype = "float32"
    """What is computed in."""
    fused: bool = True
    """Fused attention kernels where a layer can use them."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:N``."""

    def __post_init__(self) -> None:
        require("CHECKPOINT", len(self.checkpoints), len(self.checkpoints) >= 1, "at least one")
        require_choice("--runtime", self.runtime, get_args(Runtime))
        for batch_size in self.batch_sizes:
            require("--batch-sizes", batch_size, batch_size >= 1, "at least 1")
        require("--seconds", self.seconds, 0 < self.seconds < float("inf"), "above 0")
        if self.threads is not None:
            require("--threads", self.threads, self.threads >= 1, "at least 1")
        require_choice("--dtype", self.dtype, get_args(ExportDtype))
