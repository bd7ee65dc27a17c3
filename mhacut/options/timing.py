"""Conditions under which ``mhacut prune`` measures latency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mhacut.errors import option_name
from mhacut.limits import MAX_PARALLEL
from mhacut.options.option import Options, option, require

Runtime = Literal["eager", "compile", "onnx", "openvino"]


@dataclass(frozen=True, kw_only=True)
class TimingOptions(Options):
    """Whether latency is measured, and where."""

    latency: bool = option(True, "Measure latency before and after.", panel="Measuring")
    latency_batch_size: int = option(
        8, "Images per batch when latency is measured.", panel="Measuring", metavar="N", at_least=1
    )
    runtime: Runtime = option(
        "eager",
        "Runtime to measure latency in: PyTorch without compilation, torch.compile, ONNX Runtime, or "
        "OpenVINO; the last two run on the CPU.",
        panel="Measuring",
    )
    int8: bool = option(
        False,
        "Measure latency in INT8, before and after, with the dynamic quantization of ONNX Runtime.",
        panel="Measuring",
    )
    threads: int | None = option(
        None,
        "CPU threads when latency is measured; by default torch's own choice.",
        panel="Measuring",
        metavar="N",
        at_least=1,
        at_most=MAX_PARALLEL,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.int8:
            require("int8", True, self.runtime == "onnx", option_name("runtime", "onnx"))

    @property
    def on_cpu(self) -> bool:
        """Whether the runtime computes on the CPU, whatever the device."""
        return self.runtime in ("onnx", "openvino")

    def idle(self, *, bounded: bool) -> dict[str, str]:
        """Names of options that were changed to no effect, each with the reason.

        Args:
            bounded: whether a budget of latency is to be met.
        """
        if bounded:
            reason = f"{option_name('max_latency')} measures it"
            return {} if self.latency else {"latency": reason}
        if self.latency:
            return {}
        reason = f"{option_name('latency', False)} measures none"
        return {name: reason for name in self.changed() if name != "latency"}
