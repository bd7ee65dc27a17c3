"""How long models take, measured so that they can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_WARM_UP = 3
_MIN_ROUNDS = 5
_MAX_ROUNDS = 500


@torch.inference_mode()
def compare_latency(
    models: Sequence[nn.Module],
    input_size: tuple[int, int, int],
    *,
    batch_size: int = 1,
    seconds: float = 3.0,
    device: torch.device,
) -> list[float]:
    """Median milliseconds per batch of each model, in the order given.

    The models take turns, and every other round runs backwards, so that a machine that slows down or warms up
    slows all of them alike. Only differences between the models of one call mean something.

    Args:
        models: in eval mode; moved to ``device``.
        input_size: [C, H, W] in pixels.
        batch_size: images at a time.
        seconds: for everything, after the warm-up; at least five rounds are run whatever they take.
        device: to compute on.
    """
    for model in models:
        model.to(device)
    # A fixed input: some kernels are slower on denormal or special numbers, which noise does not have.
    images = torch.randn(batch_size, *input_size, generator=torch.Generator().manual_seed(0)).to(device)
    for model in models:
        for _ in range(_WARM_UP):
            _time(model, images, device)
    times: list[list[float]] = [[] for _ in models]
    began = time.perf_counter()
    for number in range(_MAX_ROUNDS):
        if number >= _MIN_ROUNDS and time.perf_counter() - began > seconds:
            break
        turns = list(enumerate(models))
        for index, model in turns if number % 2 == 0 else reversed(turns):
            times[index].append(_time(model, images, device))
    return [1000 * statistics.median(measured) for measured in times]


def _time(model: nn.Module, images: Tensor, device: torch.device) -> float:
    """Seconds of one pass; a GPU has finished before the clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    model(images)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
