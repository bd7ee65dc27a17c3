"""Options of ``mhacut evaluate``, ``mhacut bench`` and ``mhacut models``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from mhacut.errors import UsageError, option_name
from mhacut.limits import MAX_PARALLEL
from mhacut.options.base import (
    REQUIRED,
    ArchitectureOptions,
    CheckpointOptions,
    DeviceOptions,
    ExportDtype,
    LabelledImages,
    PreprocessingOptions,
    Runtime,
)
from mhacut.options.option import Options, PathLike, option, require


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(
    CheckpointOptions, LabelledImages, PreprocessingOptions, DeviceOptions, panel="Computing"
):
    batch_size: int = option(64, at_least=1)
    """Batch size."""
    amp: bool = False
    """Compute under bfloat16 autocast."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions(ArchitectureOptions, DeviceOptions, panel="Measuring"):
    checkpoints: tuple[PathLike, ...] = option(
        REQUIRED, panel="Arguments", metavar="CHECKPOINT...", reads="checkpoint"
    )
    """Dense or slim models to time. Ratios are relative to the first."""
    runtime: Runtime = "eager"
    """Runtime: PyTorch (eager), torch.compile, ONNX Runtime or OpenVINO."""
    int8: bool = False
    """Also time each checkpoint in INT8, with dynamic quantization in ONNX Runtime."""
    batch_sizes: tuple[int, ...] = option((1, 8), at_least=1)
    """Batch sizes to time."""
    seconds: float = option(5.0, above=0)
    """Seconds of measurement per batch size, for all checkpoints together."""
    threads: int | None = option(None, at_least=1, at_most=MAX_PARALLEL)
    """CPU threads for the measurements. Default: torch's choice."""
    dtype: ExportDtype = "float32"
    """Precision of the weights and of the computation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("checkpoints", "batch_sizes"):
            if not getattr(self, name):
                raise UsageError(f"{option_name(name)}: expected at least 1")
        if self.int8:
            require("int8", True, self.runtime == "onnx", option_name("runtime", "onnx"))
            require("dtype", self.dtype, self.dtype == "float32", f"float32 with {option_name('int8', True)}")
        computes = self.runtime != "openvino" or self.dtype == "float32"
        require("dtype", self.dtype, computes, f"float32 with {option_name('runtime', 'openvino')}")


class BenchKeywords(TypedDict, total=False):
    """Keywords of :func:`mhacut.bench`. A dataclass cannot type them next to ``*checkpoints``."""

    model: str | None
    model_args: Mapping[str, Any]
    part: str | None
    device: str
    runtime: Runtime
    int8: bool
    batch_sizes: tuple[int, ...]
    seconds: float
    threads: int | None
    dtype: ExportDtype


@dataclass(frozen=True, kw_only=True)
class ModelsOptions(Options, panel="Models"):
    pattern: str = option("*", panel="Arguments", metavar="PATTERN")
    """Pattern of architecture names, as in timm.list_models. Default: all architectures, which takes
    minutes."""
    refused: bool = False
    """List only architectures that cannot be pruned, with the reason."""
