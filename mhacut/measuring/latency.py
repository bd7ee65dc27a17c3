"""Measure the latency of models so that they can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

_WARM_UP = 3
_MIN_ROUNDS = 5
_MAX_ROUNDS = 500


def compare_latency(
    models: Sequence[nn.Module],
    input_size: tuple[int, int, int],
    *,
    batch_size: int = 1,
    seconds: float = 3.0,
    device: torch.device,
) -> list[float]:
    """Return the median milliseconds per batch of each model, in the order given; see :func:`take_turns`.

    Args:
        models: in eval mode; moved to ``device``.
        input_size: [C, H, W] in pixels.
        batch_size: images at a time.
        seconds: for everything, after the warm-up.
        device: to compute on.
    """
    images = fixed_images(batch_size, input_size).to(device)
    runs = [run_of(model.to(device), images) for model in models]
    return [1000 * statistics.median(times) for times in take_turns(runs, seconds=seconds, device=device)]


def fixed_images(batch_size: int, input_size: tuple[int, int, int]) -> torch.Tensor:
    """Return images to time models on, [B, C, H, W].

    They are noise: some kernels are slower on denormal or special numbers, which noise does not have.
    """
    return torch.randn(batch_size, *input_size, generator=torch.Generator().manual_seed(0))


def run_of(model: Callable[[torch.Tensor], object], images: torch.Tensor) -> Callable[[], object]:
    """Return a function that runs ``model`` on ``images`` once, without gradients."""

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
    """Return the seconds of every call of each of ``runs``, in the order given.

    They take turns, and every other round runs backwards, so that a machine that slows down or warms up
    slows all of them alike. Compare only times of one call of this function.

    Args:
        runs: what to time.
        seconds: for everything, after the warm-up; at least five rounds are run whatever they take.
        device: where they compute; it is waited for before the clock is read.
        clock: what measures a call, in seconds; ``time.process_time`` for CPU time.
    """
    for run in runs:
        for _ in range(_WARM_UP):
            _time(run, device, clock)
    times: list[list[float]] = [[] for _ in runs]
    began = time.perf_counter()
    for number in range(_MAX_ROUNDS):
        if number >= _MIN_ROUNDS and time.perf_counter() - began > seconds:
            break
        turns = list(enumerate(runs))
        for index, run in turns if number % 2 == 0 else reversed(turns):
            times[index].append(_time(run, device, clock))
    return times


def _time(run: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Return the seconds of one call, until a GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began
