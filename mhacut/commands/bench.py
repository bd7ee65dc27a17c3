"""``mhacut bench`` as a function: speed, memory and costs of checkpoints."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.huggingface import as_huggingface, is_huggingface
from mhacut.checkpoint.load import read_model
from mhacut.checkpoint.preprocessing import resolve_preprocessing
from mhacut.errors import UsageError, option_name
from mhacut.exporting.programs import (
    Conditions,
    int8_program,
    model_program,
    timing_device,
    using_threads,
)
from mhacut.measuring.latency import fixed_images, run_of, take_turns
from mhacut.options.base import PathLike, PreprocessingOptions
from mhacut.options.measure import BenchOptions
from mhacut.options.option import lists_options
from mhacut.runtime.device import default_torch, many_compiled, refusing_compile
from mhacut.runtime.files import REMOTE
from mhacut.runtime.progress import Reporter, reporting
from mhacut.surgery.flops import count_parameters, executed_flops, measure_flops

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mhacut.options.measure import BenchKeywords


@dataclass(frozen=True)
class Timing:
    batch_size: int
    median_ms: float
    """Median time of a batch."""
    spread_ms: float
    """Half of the interquartile range of the batch times."""
    ratio: float
    """Median, over paired runs, of this checkpoint's time divided by the first checkpoint's time."""
    saving_realised: float | None
    """Saved fraction of the time divided by the saved fraction of the FLOPs, both relative to the first
    checkpoint. None if no FLOPs are saved."""
    executed: float | None
    """FLOPs that run, padding included, divided by those of the first checkpoint. Measured only for eager
    PyTorch on CPUs, else None."""
    peak_mib: float | None
    """Peak GPU memory of a run in MiB, including weights and images. None on the CPU."""
    runs: int


@dataclass(frozen=True)
class BenchedModel:
    source: str
    architecture: str
    flops: int
    parameters: int
    file_bytes: int | None
    """Size of the checkpoint file, or of the ONNX file for INT8. None for ``timm:NAME``."""
    timings: tuple[Timing, ...]
    int8: bool = False


@dataclass(frozen=True)
class BenchResult:
    """Result of :func:`bench`."""

    models: tuple[BenchedModel, ...]
    """Checkpoints in the given order, then their INT8 versions if requested. Ratios are relative to the first
    model."""
    runtime: str
    dtype: str
    device: str
    threads: int


@dataclass(frozen=True)
class _Entry:
    checkpoint: Checkpoint
    size: tuple[int, int, int]
    """Shape of 1 input image, [C, H, W]."""
    flops: int
    program: Callable[[Tensor], object]
    """Function that runs the model on float32 images on the device."""
    file_bytes: int | None
    int8: bool = False


@default_torch()
@lists_options(BenchOptions)
def bench(
    *checkpoints: PathLike,
    progress: bool | None = None,
    reporter: Reporter | None = None,
    **options: Unpack[BenchKeywords],
) -> BenchResult:
    """Compare the speed of checkpoints, timed in turns so that other load slows all of them equally.

    Args:
        checkpoints: files or names that ``mhacut prune`` reads or writes. The first is the baseline.
        progress: show a progress bar. Default: in notebooks and terminals.
        reporter: receives progress and messages instead of a bar.
        options: options of the command line, listed below by ``help()``.

    Raises:
        MhacutError: a subclass in :mod:`mhacut.errors`.
    """
    with reporting(reporter, progress) as shown:
        return run_bench(BenchOptions.of(checkpoints=checkpoints, **options), shown)


def run_bench(options: BenchOptions, reporter: Reporter) -> BenchResult:
    device = timing_device(options.runtime, options.device)
    reporter.start("reading")
    checkpoints = []
    for path in options.checkpoints:
        model = None if str(path).startswith(REMOTE) else options.model
        checkpoints.append(read_model(path, model=model, model_args=options.model_args, part=options.part))
    if any(map(is_huggingface, checkpoints)):  # equal code on both sides, as far as possible
        checkpoints = [as_huggingface(checkpoint) for checkpoint in checkpoints]
    for checkpoint in checkpoints:
        checkpoint.model.requires_grad_(False)
    sizes = _input_sizes(checkpoints, reporter)
    with using_threads(options.threads) as threads, many_compiled():
        conditions = Conditions(options.runtime, device, threads, options.dtype)
        reporter.start("preparing")
        entries = []
        for checkpoint, size in zip(checkpoints, sizes, strict=True):
            flops = measure_flops(checkpoint.model, size)
            program = model_program(checkpoint.model, size, conditions)
            entries.append(_Entry(checkpoint, size, flops, program, _file_bytes(checkpoint)))
            reporter.advance(len(entries), len(checkpoints))
        if options.int8:
            reporter.start("quantizing")
            for entry in tuple(entries):
                program, file_bytes = int8_program(entry.checkpoint.model, entry.size, threads)
                entries.append(replace(entry, program=program, file_bytes=file_bytes, int8=True))
        timings = []
        reporter.start("timing")
        for batch_size in options.batch_sizes:
            timings.append(_timings(entries, batch_size, options.seconds, conditions))
            reporter.advance(len(timings), len(options.batch_sizes), f"batch {batch_size}")
    models = tuple(
        BenchedModel(
            source=entry.checkpoint.source,
            architecture=entry.checkpoint.identity.architecture,
            flops=entry.flops,
            parameters=count_parameters(entry.checkpoint.model),
            file_bytes=entry.file_bytes,
            timings=per_batch,
            int8=entry.int8,
        )
        for entry, per_batch in zip(entries, zip(*timings, strict=True), strict=True)
    )
    return BenchResult(models, options.runtime, options.dtype, str(device), threads)


def _file_bytes(checkpoint: Checkpoint) -> int | None:
    header = checkpoint.header
    return None if header is None else sum(path.stat().st_size for path in header.shards or [header.path])


def _input_sizes(checkpoints: Sequence[Checkpoint], reporter: Reporter) -> list[tuple[int, int, int]]:
    """Return the image shape of each checkpoint.

    If possible, dense models get the image size of the slim models.
    """
    sizes = [resolve_preprocessing(one, PreprocessingOptions()).input_size for one in checkpoints]
    slim_sizes = {size for one, size in zip(checkpoints, sizes, strict=True) if one.record is not None}
    if len(slim_sizes) == 1:
        (wanted,) = slim_sizes
        for index, one in enumerate(checkpoints):
            if one.record is None and sizes[index] != wanted:
                with suppress(UsageError):
                    override = PreprocessingOptions(img_size=wanted[1])
                    sizes[index] = resolve_preprocessing(one, override).input_size
    if len(set(sizes)) > 1:
        listed = ", ".join(
            f"{one.source} {size[1]}x{size[2]}" for one, size in zip(checkpoints, sizes, strict=True)
        )
        reporter.log(f"image sizes differ ({listed}), so ratios depend on the sizes too")
    return sizes


def _timings(
    entries: Sequence[_Entry], batch_size: int, seconds: float, conditions: Conditions
) -> list[Timing]:
    device = conditions.device
    images = [fixed_images(batch_size, entry.size).to(device) for entry in entries]
    runs = [run_of(entry.program, x) for entry, x in zip(entries, images, strict=True)]
    with refusing_compile(option_name("runtime", "compile")):
        times = take_turns(runs, seconds=seconds, device=device)
    counts = conditions.runtime == "eager" and device.type == "cpu"
    executed = [executed_flops(run) for run in runs] if counts else []
    return [
        timing_of(
            batch_size,
            per_run,
            times[0],
            saved_flops=0 if entry.int8 else 1 - entry.flops / entries[0].flops,  # INT8 saves time, not FLOPs
            executed=executed[index] / executed[0] if counts else None,
            peak_mib=_peak_mib(entry, run, batch_size, device) if device.type == "cuda" else None,
        )
        for index, (entry, run, per_run) in enumerate(zip(entries, runs, times, strict=True))
    ]


def timing_of(
    batch_size: int,
    times: Sequence[float],
    first: Sequence[float],
    *,
    saved_flops: float,
    executed: float | None = None,
    peak_mib: float | None,
) -> Timing:
    """Summarise ``times`` of a checkpoint, in seconds. ``first`` are the times of the first checkpoint."""
    low, _, high = statistics.quantiles(times, n=4)
    ratio = statistics.median(one / other for one, other in zip(times, first, strict=True))
    return Timing(
        batch_size=batch_size,
        median_ms=1000 * statistics.median(times),
        spread_ms=1000 * (high - low) / 2,
        ratio=ratio,
        saving_realised=(1 - ratio) / saved_flops if saved_flops > 0 else None,
        executed=executed,
        peak_mib=peak_mib,
        runs=len(times),
    )


def _peak_mib(entry: _Entry, run: Callable[[], object], batch_size: int, device: torch.device) -> float:
    allocated = torch.cuda.memory_allocated(device)  # by all checkpoints and their images
    torch.cuda.reset_peak_memory_stats(device)
    run()
    taken = torch.cuda.max_memory_allocated(device) - allocated
    model = entry.checkpoint.model
    weights = sum(part.nbytes for part in (*model.parameters(), *model.buffers()))
    images = torch.float32.itemsize * batch_size * math.prod(entry.size)
    return (weights + images + taken) / 2**20
