"""Time models and layers in turns.

A model that must meet a latency budget is timed in a new process, as its user will run it: a process's memory
allocator depends on earlier work. A pruned DeiT-S (batch size 8) had .479 of the dense model's time in the
process that pruned it, and .509 to .514 in 4 new processes.
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
    """Times pruned models in turns with the dense model, under the same load of the machine."""

    def __init__(
        self,
        timing: TimingOptions,
        dense: nn.Module,
        size: tuple[int, int, int],
        device: torch.device,
        reporter: Reporter = SILENT,
    ) -> None:
        """Prepare timing of ``dense`` (float32) and other models on images of ``size`` [C, H, W]."""
        self.timing, self.size, self.dense, self.reporter = timing, size, dense, reporter
        self.device = timing_device(timing.runtime, "cpu" if timing.on_cpu else str(device))
        self.latency_model: TimeTable | TimeCurve | None = None
        """Predictor of a plan's run time. It is measured when a latency budget first needs a prediction."""
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
        """Time the dense model, ``models`` and ``parts`` in turns, for ``seconds`` in total.

        ``parts`` are functions of :meth:`as_run`. With ``precision``, the target for the relative standard
        error of the time ratios, timing may take 5 times as long.
        """
        with (
            using_threads(self.timing.threads) as threads,
            many_compiled(),
            refusing_compile(option_name("runtime", "compile")),
        ):
            # Kept, because compiling or exporting a model takes longer than timing it.
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
        """Time a pruned model in turns with the dense model in a new process.

        The new process opens both models from ``records``: slim-file records with keys ``dense`` and
        ``slim``.
        """
        result = None
        if self.timing.runtime == "eager":  # other runtimes manage their own memory
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
                    # Files, not a fork: a forked process would inherit the allocator's state.
                    for name, written in (("dense", self.dense), ("slim", model)):
                        save_slim(Path(files[name]), written, records[name], {})
                    result = in_new_process(__name__, "write_comparison", {**job, "files": files})
            except (MhacutError, OSError):
                pass
        if result is None:  # for example, the new process does not know a model class of the caller
            return self.compare([model], seconds=seconds, precision=precision)
        comparison = Comparison(**result)
        self._log_busy(comparison)
        return comparison

    def as_run(self, part: Replay) -> Run:
        """Return a function that runs the submodule ``part`` once on noise, on the stopwatch's device."""
        with using_threads(self.timing.threads) as threads:
            conditions = Conditions(self.timing.runtime, self.device, threads)
            return part_run(part, part.noise(torch.device("cpu")), conditions, int8=self.timing.int8)

    def conditions(self) -> dict[str, Any]:
        timing = self.timing
        return {
            "runtime": timing.runtime,
            "int8": timing.int8,
            "batch_size": timing.latency_batch_size,
            "device": str(self.device),
            "threads": timing.threads or torch.get_num_threads(),
            "machine": machine(self.device),
        }

    def _log_busy(self, comparison: Comparison) -> None:
        if not comparison.steady and not self._logged_busy:
            self._logged_busy = True
            self.reporter.log(
                "this machine is busy: during the measurement, the time of the same model varied by "
                f"{100 * comparison.drift:.0f} %"
            )

    def _run(self, model: nn.Module, threads: int) -> Run:
        images = fixed_images(self.timing.latency_batch_size, self.size)
        device = torch.empty(0, device=self.device).device  # "cuda" becomes "cuda:0"
        if next(model.parameters()).device != device:  # a copy: the original may be in use
            model = copy.deepcopy(model).to(self.device)
        if self.timing.int8:
            return run_of(int8_program(model, self.size, threads)[0], images)
        conditions = Conditions(self.timing.runtime, self.device, threads)
        return run_of(model_program(model, self.size, conditions), images.to(self.device))


def write_comparison() -> None:
    """Time the models of a job, read as JSON from stdin, and print the comparison as JSON."""
    job = json.load(sys.stdin)
    # The caller's setting for TF32 on GPUs.
    torch.set_float32_matmul_precision(job["matmul_precision"])
    dense, slim = (load_model(job["files"][name]) for name in ("dense", "slim"))
    timing, device = TimingOptions.of(**job["timing"]), torch.device(job["device"])
    stopwatch = Stopwatch(timing, dense.to(device), tuple(job["size"]), device)
    comparison = stopwatch.compare([slim], seconds=job["seconds"], precision=job["precision"])
    sys.stdout.write(json.dumps(asdict(comparison)) + "\n")


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = []  # platform.processor() is empty or "x86_64" on Linux
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
