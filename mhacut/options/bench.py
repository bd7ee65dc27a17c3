"""Options of ``mhacut bench``."""

from __future__ import annotations

from dataclasses import dataclass

from mhacut.errors import UsageError, option_name
from mhacut.limits import MAX_PARALLEL
from mhacut.options.base import DeviceOptions, ExportDtype, ModelOptions, PathLike
from mhacut.options.option import REQUIRED, option, require
from mhacut.options.timing import Runtime


@dataclass(frozen=True, kw_only=True)
class BenchOptions(ModelOptions, DeviceOptions):
    """Options of ``mhacut bench``."""

    checkpoints: tuple[PathLike, ...] = option(
        REQUIRED,
        "One or more checkpoints; the others are compared with the first.",
        panel="Arguments",
        metavar="CHECKPOINT...",
        reads="checkpoint",
    )
    runtime: Runtime = option(
        "eager", "PyTorch without compilation, torch.compile, ONNX Runtime, or OpenVINO.", panel="Measuring"
    )
    int8: bool = option(
        False,
        "Time each checkpoint in INT8 too, with the dynamic quantization of ONNX Runtime.",
        panel="Measuring",
    )
    batch_sizes: tuple[int, ...] = option(
        (1, 8), "Images per batch.", panel="Measuring", metavar="N,N", at_least=1
    )
    seconds: float = option(
        5.0,
        "Time to measure per batch size, for all checkpoints together.",
        panel="Measuring",
        metavar="SECONDS",
        above=0,
    )
    threads: int | None = option(
        None,
        "CPU threads; by default torch's own choice.",
        panel="Computing",
        metavar="N",
        at_least=1,
        at_most=MAX_PARALLEL,
    )
    dtype: ExportDtype = option("float32", "Precision of the computation.", panel="Computing")
    fused: bool = option(True, "Use fused attention where a layer can.", panel="Computing")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.checkpoints:
            raise UsageError(f"{option_name('checkpoints')}: expected at least one")
        require("batch_sizes", list(self.batch_sizes), bool(self.batch_sizes), "at least one")
        if self.int8:
            require("int8", True, self.runtime == "onnx", option_name("runtime", "onnx"))
            require("dtype", self.dtype, self.dtype == "float32", f"float32 with {option_name('int8', True)}")
        computes = self.runtime != "openvino" or self.dtype == "float32"
        require("dtype", self.dtype, computes, f"float32 with {option_name('runtime', 'openvino')}")
