"""Measure latencies of models in turns, so that their ratios are reliable."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_WARM_UP = 3
_MIN_ROUNDS = 5
_MAX_ROUNDS = 500
_DRIFT = 0.03
"""Largest accepted change of the first program's time during a measurement, as a fraction. After a larger
change, the measurement is repeated."""
_TRIES = 3
_MAX_TRIES = 5
_DEVIATION = 1.4826 * 1.2533
"""Factor for Gaussian times: median absolute deviation / sqrt(count) * factor is the standard error of the
median."""
_PATIENCE = 3.0
"""Maximum wall time of a measurement of processor time, divided by the planned duration."""

Run = Callable[[], object]


def latency_conditions(conditions: Mapping[str, Any]) -> str:
    runtime = [] if conditions["runtime"] == "eager" else [conditions["runtime"]]
    parts = [f"batch {conditions['batch_size']}", *runtime, *["INT8"] * conditions["int8"]]
    device = "CPU" if conditions["device"] == "cpu" else conditions["device"]
    return f"({', '.join([*parts, device])})"


def fixed_images(batch_size: int, input_size: tuple[int, int, int]) -> torch.Tensor:
    return torch.randn(batch_size, *input_size, generator=torch.Generator().manual_seed(0))


def run_of(model: Callable[[torch.Tensor], object], images: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return model(images)

    return run


def take_turns(
    runs: Sequence[Callable[[], object]],
    *,
    seconds: float,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Time all ``runs`` in turns.

    Return the seconds of each call, by run. Every other round is in reverse order, so that changes of the
    machine's speed affect all runs equally.
    """
    return [[own for (own,) in times] for times in _turns(runs, seconds, device, (clock,))]


@dataclass(frozen=True)
class Comparison:
    """Median times of several programs that ran in turns, and ratios to the first program."""

    milliseconds: tuple[float, ...]
    """Median run time of each model: processor time for 1 CPU thread (except on Windows), else wall time."""
    wall: tuple[float, ...]
    """Median wall time of each timed model or layer, in milliseconds."""
    ratios: tuple[float, ...]
    """For each program, the median over rounds of its time divided by the first program's time."""
    drift: float
    """Relative difference of the first program's median times in the first and second half of the rounds."""
    error: float = 0.0
    """Largest relative standard error of the ratios, if rounds are independent."""

    @property
    def steady(self) -> bool:
        return self.drift <= _DRIFT


def compare_runs(
    runs: Sequence[Run],
    *,
    seconds: float,
    device: torch.device,
    threads: int,
    precision: float | None = None,
) -> Comparison:
    """Time ``runs`` in turns.

    The timing is repeated if the machine's speed changes. With 1 CPU thread, processor time is measured,
    which excludes other programs.
    """
    # Windows counts the time of a process in ticks of 16 ms, which is too coarse.
    by_process = device.type == "cpu" and threads == 1 and sys.platform != "win32"
    clocks = (time.perf_counter, time.process_time) if by_process else (time.perf_counter,)
    best: Comparison | None = None
    earlier: list[list[list[float]]] = [[] for _ in runs]
    for number in range(_TRIES if precision is None else _MAX_TRIES):
        times = _turns(runs, seconds, device, clocks, _PATIENCE)
        if precision is not None:
            earlier = times = [[*own, *more] for own, more in zip(earlier, times, strict=True)]
        compared = _compared(times)
        best = compared if precision is not None or best is None or compared.drift < best.drift else best
        # With a precision the rounds of all tries count, so that more tries narrow the error.
        enough = best.steady or number + 1 >= _TRIES
        if enough and (precision is None or best.error <= precision):
            break
    assert best is not None
    return best


def _compared(times: Sequence[Sequence[Sequence[float]]]) -> Comparison:
    # Ratios are taken within a round and then their median: what slows the machine for a while slows both.
    compared = [[call[-1] for call in own] for own in times]
    first = compared[0]
    half = len(first) // 2
    early, late = statistics.median(first[:half]), statistics.median(first[half:])
    return Comparison(
        tuple(1000 * statistics.median(own) for own in compared),
        tuple(1000 * statistics.median(call[0] for call in own) for own in times),
        tuple(statistics.median(a / b for a, b in zip(own, first, strict=True)) for own in compared),
        abs(late / early - 1),
        max(_relative_error([a / b for a, b in zip(own, first, strict=True)]) for own in compared),
    )


def _relative_error(values: Sequence[float]) -> float:
    middle = statistics.median(values)
    deviation = statistics.median(abs(value - middle) for value in values)
    return _DEVIATION * deviation / middle / math.sqrt(len(values))


def _turns(
    runs: Sequence[Run],
    seconds: float,
    device: torch.device,
    clocks: Sequence[Callable[[], float]],
    patience: float = 1.0,
) -> list[list[list[float]]]:
    # The first calls allocate memory, pick kernels, and compile.
    for run in runs:
        for _ in range(_WARM_UP):
            _time(run, device, clocks)
    times: list[list[list[float]]] = [[] for _ in runs]
    began, waiting = clocks[-1](), time.perf_counter()
    for number in range(_MAX_ROUNDS):
        late = time.perf_counter() - waiting > patience * seconds
        if number >= _MIN_ROUNDS and (late or clocks[-1]() - began > seconds):
            break
        # Backwards every other round, so that no program always runs right after the same other one.
        turns = list(enumerate(runs))
        for index, run in turns if number % 2 == 0 else reversed(turns):
            times[index].append(_time(run, device, clocks))
    return times


def _time(run: Run, device: torch.device, clocks: Sequence[Callable[[], float]]) -> list[float]:
    # Kernels are only queued: without waiting, the clock would measure the queueing.
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = [clock() for clock in clocks]
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return [clock() - start for clock, start in zip(clocks, began, strict=True)]
