"""``mhacut bench``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from mhacut.budget import format_flops
from mhacut.cli.flags import command
from mhacut.cli.running import Console
from mhacut.options.measure import BenchOptions
from mhacut.text import safe, table

if TYPE_CHECKING:
    from mhacut.commands.bench import BenchedModel, BenchResult, Timing


@command(BenchOptions)
def bench(options: BenchOptions, console: Console) -> None:
    """Compare the speed of checkpoints, dense or slim.

    The checkpoints take turns, so that other load on the machine slows all of them alike. Trust ratios more
    than milliseconds. On a GPU, memory is the peak of a model's weights, its images and what a run takes.

    Example: mhacut bench vit.safetensors vit-2.0G.safetensors --threads 2
    """
    from mhacut.commands.bench import run_bench

    result = run_bench(options, console)
    console.result(_text(result), asdict(result))


def _text(result: BenchResult) -> str:
    costs = [["", "FLOPs", "parameters", "file, MB"]]
    times = [["", "batch", "ms", "+-", "images/s", "ratio", "saved", "peak MiB"]]
    for number, model in enumerate(result.models, start=1):
        size = "" if model.file_bytes is None else f"{model.file_bytes / 1e6:.1f}"
        costs.append([_name(number, model), format_flops(model.flops), format_flops(model.parameters), size])
    for index in range(len(result.models[0].timings)):
        for number, model in enumerate(result.models, start=1):
            times.append([f"[{number}]", *_cells(model.timings[index])])
    if not any(row[-1] for row in times[1:]):
        times = [row[:-1] for row in times]
    return "\n".join(
        [
            table(costs),
            "",
            table(times),
            "",
            f"{result.runtime}, {result.dtype} on {safe(result.device)}, {result.threads} thread(s)",
            "ratio: median time relative to [1] in the same round; saved: share of the saved FLOPs that "
            "became saved time",
        ]
    )


def _name(number: int, model: BenchedModel) -> str:
    return f"[{number}] {safe(model.source)}{' in INT8' if model.int8 else ''}"


def _cells(timing: Timing) -> list[str]:
    saved = "" if timing.saving_realised is None else f"{100 * timing.saving_realised:.0f}%"
    peak = "" if timing.peak_mib is None else f"{timing.peak_mib:.0f}"
    rate = 1000 * timing.batch_size / timing.median_ms
    ratio = f"{100 * timing.ratio:.1f}%"
    return [
        str(timing.batch_size),
        f"{timing.median_ms:.2f}",
        f"{timing.spread_ms:.2f}",
        f"{rate:.1f}",
        ratio,
        saved,
        peak,
    ]
