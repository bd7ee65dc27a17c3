"""Time models, and single layers, in turns, under the conditions that options state.

A cut model that must meet a budget of time is timed in a new process, as its user will run it: how the memory
allocator of a process serves large activations depends on what the process did before. The ratio of a cut
DeiT-S at batch size 8 was .479 in the process that pruned it and .509 to .514 in four new ones.
"""

from __future__ import annotations

import copy
import json
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mhacut.checkpoint.load import load_model
from mhacut.checkpoint.record import SlimRecord
from mhacut.checkpoint.write import save_slim
from mhacut.errors import MhacutError, option_name
from mhacut.exporting.programs import (
    Conditions,
    int8_program,
    model_program,
    part_run,
    timing_device,
    using_threads,
)
from mhacut.measuring.latency import Comparison, Run, compare_runs, fixed_images, run_of
from mhacut.measuring.predicted_time import TimeCurve, TimeTable
from mhacut.options.base import TimingOptions
from mhacut.runtime.device import many_compiled, refusing_compile
from mhacut.runtime.process import in_new_process
from mhacut.runtime.progress import SILENT, Reporter
from mhacut.surgery.hooks import Replay


class Stopwatch:
    """Times models in turns with the dense one."""

    def __init__(
        self,
        timing: TimingOptions,
        dense: nn.Module,
        size: tuple[int, int, int],
        device: torch.device,
        reporter: Reporter = SILENT,
    ) -> None:
        """Take the dense model, which is not changed.

        Args:
            timing: where and how to measure.
            dense: float32, eval mode.
            size: [C, H, W] of an image.
            device: device to measure on, unless the runtime computes on the CPU.
            reporter: receives messages.
        """
        self.timing, self.size, self.dense, self.reporter = timing, size, dense, reporter
        self.device = timing_device(timing.runtime, "cpu" if timing.on_cpu else str(device))
        self.latency_model: TimeTable | TimeCurve | None = None
        """Times by which plans are made, once they are measured for a budget of time."""
        self._dense_run: Run | None = None
        self._logged_busy = False

    def compare(
        self,
        models: Sequence[nn.Module],
        parts: Sequence[Run] = (),
        *,
        seconds: float,
        precision: float | None = None,
        dense: bool = True,
    ) -> Comparison:
        """Time ``models``, and ``parts`` of models, in turns with the dense one, which is the first."""
        with (
            using_threads(self.timing.threads) as threads,
            many_compiled(),
            refusing_compile(option_name("runtime", "compile")),
        ):
            # Made once: to compile or translate a model takes longer than to time it.
            if dense and self._dense_run is None:
                self._dense_run = self._run(self.dense, threads)
            runs = [self._dense_run] if dense and self._dense_run is not None else []
            runs += [*(self._run(model, threads) for model in models), *parts]
            device = self.device
            comparison = compare_runs(
                runs, seconds=seconds, device=device, threads=threads, precision=precision
            )
        self._log_busy(comparison)
        return comparison

    def compare_in_new_process(
        self, model: nn.Module, records: Mapping[str, SlimRecord], *, seconds: float, precision: float
    ) -> Comparison:
        """Time one model in turns with the dense one in a new process, both read from files.

        If no such process gives a result (it knows no models that this one has registered), or compiles
        first, they are timed in this process.
        """
        result = None
        if self.timing.runtime == "eager":  # other runtimes keep their memory: both ways agree
            job = {
                "timing": {**self.timing.values(), "threads": self.timing.threads or torch.get_num_threads()},
                "matmul_precision": torch.get_float32_matmul_precision(),
                "size": self.size,
                "device": str(self.device),
                "seconds": seconds,
                "precision": precision,
            }
            try:
                with tempfile.TemporaryDirectory(prefix="mhacut-times-") as folder:
                    files = {name: f"{folder}/{name}.safetensors" for name in records}
                    # As files: a forked process would inherit the memory that times depend on.
                    for name, written in (("dense", self.dense), ("slim", model)):
                        save_slim(Path(files[name]), written, records[name], {})
                    result = in_new_process(__name__, "write_comparison", {**job, "files": files})
            except (MhacutError, OSError):
                pass
        if result is None:
            return self.compare([model], seconds=seconds, precision=precision)
        comparison = Comparison(**result)
        self._log_busy(comparison)
        return comparison

    def as_run(self, part: Replay) -> Run:
        """Return a function that runs a part of a model, which is moved to the device, once."""
        with using_threads(self.timing.threads) as threads:
            conditions = Conditions(self.timing.runtime, self.device, threads)
            return part_run(part, part.noise(torch.device("cpu")), conditions, int8=self.timing.int8)

    def conditions(self) -> dict[str, Any]:
        """Return the conditions that times are measured under, with the names that records give them."""
        asked = self.timing
        return {
            "runtime": asked.runtime,
            "int8": asked.int8,
            "batch_size": asked.latency_batch_size,
            "device": str(self.device),
            "threads": asked.threads or torch.get_num_threads(),
            "machine": machine(self.device),
        }

    def _log_busy(self, comparison: Comparison) -> None:
        if not comparison.steady and not self._logged_busy:
            self._logged_busy = True
            self.reporter.log(
                "this machine is busy: the time of the same program varied by "
                f"{100 * comparison.drift:.0f} % while it was measured"
            )

    def _run(self, model: nn.Module, threads: int) -> Run:
        images = fixed_images(self.timing.latency_batch_size, self.size)
        device = torch.empty(0, device=self.device).device  # "cuda" has a number then, as models on it
        if next(model.parameters()).device != device:  # where it is, it may be at work
            model = copy.deepcopy(model).to(self.device)
        if self.timing.int8:
            return run_of(int8_program(model, self.size, threads)[0], images)
        conditions = Conditions(self.timing.runtime, self.device, threads)
        return run_of(model_program(model, self.size, conditions), images.to(self.device))


def write_comparison() -> None:
    """Time what stdin names, and write the comparison to stdout; called in a process of its own."""
    job = json.load(sys.stdin)
    # A setting of the caller's process, by which a GPU multiplies in TF32 or not.
    torch.set_float32_matmul_precision(job["matmul_precision"])
    dense, slim = (load_model(job["files"][name]) for name in ("dense", "slim"))
    timing, device = TimingOptions.of(**job["timing"]), torch.device(job["device"])
    stopwatch = Stopwatch(timing, dense.to(device), tuple(job["size"]), device)
    comparison = stopwatch.compare([slim], seconds=job["seconds"], precision=job["precision"])
    sys.stdout.write(json.dumps(asdict(comparison)) + "\n")


def machine(device: torch.device) -> str:
    """Return the name of the processor, or of the GPU, that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = []  # on Linux, platform.processor() is empty or no more than "x86_64"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
