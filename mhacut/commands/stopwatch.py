"""Time models, and single layers, in turns, under the conditions that options state."""

from __future__ import annotations

import copy
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mhacut.errors import option_name
from mhacut.exporting.programs import (
    Conditions,
    int8_program,
    model_program,
    part_run,
    timing_device,
    using_threads,
)
from mhacut.measuring.latency import Comparison, Run, compare_runs, fixed_images, run_of
from mhacut.options.base import TimingOptions
from mhacut.runtime.device import many_compiled, refusing_compile, same_device
from mhacut.runtime.progress import Reporter
from mhacut.surgery.hooks import Replay


class Stopwatch:
    """Times models beside the dense one."""

    def __init__(
        self,
        timing: TimingOptions,
        dense: nn.Module,
        size: tuple[int, int, int],
        device: torch.device,
        reporter: Reporter,
    ) -> None:
        """Take the dense model, which is not changed.

        Args:
            timing: where and how to measure.
            dense: float32, eval mode.
            size: of an image, [C, H, W].
            device: to measure on, unless the runtime computes on the CPU.
            reporter: receives messages.

        Raises:
            MhacutError: the runtime is not installed.
        """
        self.timing, self.size, self.reporter, self.dense = timing, size, reporter, dense
        self.device = timing_device(timing.runtime, "cpu" if timing.on_cpu else str(device))
        self._dense_run: Run | None = None
        self._logged_busy = False

    def start(self, stage: str) -> None:
        """Begin a stage of the command; a busy machine is logged once per stage."""
        self._logged_busy = False
        self.reporter.start(stage)

    def beside(
        self,
        models: Sequence[nn.Module],
        parts: Sequence[Run] = (),
        *,
        seconds: float,
        precision: float | None = None,
    ) -> Comparison:
        """Time ``models``, and ``parts`` of models, in turns with the dense one, which is the first.

        Args:
            models: not changed.
            parts: functions that :meth:`ready` returned.
            seconds: of measuring, for all of them together.
            precision: relative standard error of the ratios until which it goes on, up to five times as long.
        """
        with using_threads(self.timing.threads) as threads, many_compiled():
            if self._dense_run is None:
                self._dense_run = self._run(self.dense, threads)
            runs = [self._dense_run, *(self._run(model, threads) for model in models)]
            return self._compared([*runs, *parts], seconds, threads, precision)

    def parts(self, parts: Sequence[Run], *, seconds: float) -> Comparison:
        """Time parts of models, functions that :meth:`ready` returned, in turns."""
        with using_threads(self.timing.threads) as threads, many_compiled():
            return self._compared(parts, seconds, threads)

    def ready(self, part: Replay) -> Run:
        """Return a function that runs a part of a model once, in the runtime and on the device.

        Args:
            part: moved to the device.
        """
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

    def _compared(
        self, runs: Sequence[Run], seconds: float, threads: int, precision: float | None = None
    ) -> Comparison:
        with refusing_compile(option_name("runtime", "compile")):
            found = compare_runs(
                runs, seconds=seconds, device=self.device, threads=threads, precision=precision
            )
        self.log_busy(found)
        return found

    def log_busy(self, found: Comparison) -> None:
        """Log, once per stage, that the machine was busy, if it was."""
        if not found.steady and not self._logged_busy:
            self._logged_busy = True
            self.reporter.log(
                f"this machine is busy: the time of the same program varied by {100 * found.drift:.0f} % "
                "while it was measured"
            )

    def _run(self, model: nn.Module, threads: int) -> Run:
        images = fixed_images(self.timing.latency_batch_size, self.size)
        if not same_device(next(model.parameters()).device, self.device):  # where it is, it may be at work
            model = copy.deepcopy(model).to(self.device)
        if self.timing.int8:
            return run_of(int8_program(model, self.size, threads)[0], images)
        conditions = Conditions(self.timing.runtime, self.device, threads)
        return run_of(model_program(model, self.size, conditions), images.to(self.device))


def machine(device: torch.device) -> str:
    """Return the name of the processor, or of the GPU, that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = []
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
