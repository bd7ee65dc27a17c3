"""``mhacut bench`` as a function: how fast checkpoints are beside each other, and what else they cost."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.load import read_model
from mhacut.checkpoint.preprocessing import resolve_preprocessing
from mhacut.checkpoint.pretrained import TIMM_PREFIX
from mhacut.errors import MhacutError, UsageError
from mhacut.exporting.runtimes import DTYPES, onnx_runner, require_onnx
from mhacut.measuring.latency import fixed_images, run_of, take_turns
from mhacut.options.base import PathLike, PreprocessingOptions
from mhacut.options.bench import BenchOptions
from mhacut.runtime.device import resolve_device
from mhacut.runtime.progress import Reporter, Silent
from mhacut.surgery.flops import count_parameters, measure_flops

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mhacut.options.keywords import BenchKeywords

ALIGNED = 8
"""Widths of one more than a multiple of it ran 17-28 % slower than that multiple (DeiT-S, float32, CPU)."""


@dataclass(frozen=True)
class Timing:
    """One checkpoint at one batch size."""

    batch_size: int
    median_ms: float
    """Per batch."""
    spread_ms: float
    """Half of the range that holds the middle half of the runs."""
    ratio: float
    """Median of the ratios to the first checkpoint's run of the same round."""
    saving_realised: float | None
    """Share of the saving in FLOPs against the first checkpoint that became time, 1 is all; None where no
    FLOPs were saved."""
    peak_mib: float | None
    """Of a process that reads the checkpoint and runs it, or of the GPU's memory while it ran; None where
    that cannot be measured."""
    runs: int


@dataclass(frozen=True)
class Benched:
    """One checkpoint."""

    source: str
    architecture: str
    flops: int
    parameters: int
    file_bytes: int | None
    """None for ``timm:NAME``."""
    timings: tuple[Timing, ...]
    """A batch size each."""


@dataclass(frozen=True)
class BenchResult:
    """What :func:`bench` measured."""

    models: tuple[Benched, ...]
    """In the order given; ratios are to the first."""
    runtime: str
    dtype: str
    fused: bool
    device: str
    threads: int


def bench(
    *checkpoints: PathLike, reporter: Reporter | None = None, **options: Unpack[BenchKeywords]
) -> BenchResult:
    """Time checkpoints in turns, so that what else the machine does falls on all of them alike.

    Args:
        checkpoints: whatever ``mhacut prune`` reads or writes; the others are compared with the first.
        reporter: receives progress and messages; silent by default.
        options: those of the command line; see :class:`mhacut.options.keywords.BenchKeywords`.

    Raises:
        MhacutError: and its kinds, in :mod:`mhacut.errors`.
    """
    return run_bench(BenchOptions.from_flat(checkpoints=checkpoints, **options), reporter or Silent())


def run_bench(options: BenchOptions, reporter: Reporter) -> BenchResult:
    """:func:`bench` with its options in one object."""
    if options.runtime == "onnx":
        require_onnx("--runtime onnx")
        if options.device not in ("auto", "cpu"):
            raise UsageError(f"--device {options.device}: --runtime onnx is measured on the CPU only")
    device = torch.device("cpu") if options.runtime == "onnx" else resolve_device(options.device)
    reporter.start("reading")
    loaded = [_read(path, options, reporter) for path in options.checkpoints]
    sizes = _sizes(loaded, reporter)
    flops = [measure_flops(one.model, size) for one, size in zip(loaded, sizes, strict=True)]
    with _threads(options.threads) as threads:
        programs = []
        for number, (one, size) in enumerate(zip(loaded, sizes, strict=True)):
            reporter.start(f"preparing {one.source}")
            programs.append(_program(one.model, size, options, device, threads))
            reporter.advance(number + 1, len(loaded))
        timings: list[list[Timing]] = [[] for _ in loaded]
        for batch_size in options.batch_sizes:
            reporter.start(f"batch {batch_size}")
            images = [fixed_images(batch_size, size).to(device) for size in sizes]
            runs = [run_of(program, x) for program, x in zip(programs, images, strict=True)]
            times = _timed(runs, options, device)
            for index, one in enumerate(loaded):
                peak = _peak_mib(one, runs[index], batch_size, sizes[index], options, device, threads)
                timings[index].append(
                    _timing(batch_size, times[index], times[0], flops[index], flops[0], peak)
                )
    models = tuple(
        Benched(
            source=one.source,
            architecture=one.identity.architecture,
            flops=count,
            parameters=count_parameters(one.model),
            file_bytes=None if one.path is None else one.path.stat().st_size,
            timings=tuple(measured),
        )
        for one, count, measured in zip(loaded, flops, timings, strict=True)
    )
    return BenchResult(models, options.runtime, options.dtype, options.fused, str(device), threads)


def _sizes(loaded: Sequence[Checkpoint], reporter: Reporter) -> list[tuple[int, int, int]]:
    """Of the images of each; dense models take those that slim ones were cut for, if they can."""
    sizes = [resolve_preprocessing(one, PreprocessingOptions()).input_size for one in loaded]
    cut_for = {size for one, size in zip(loaded, sizes, strict=True) if one.record is not None}
    if len(cut_for) == 1:
        (wanted,) = cut_for
        for index, one in enumerate(loaded):
            if one.record is None and sizes[index] != wanted:
                with suppress(UsageError):
                    override = PreprocessingOptions(img_size=wanted[1])
                    sizes[index] = resolve_preprocessing(one, override).input_size
    if len(set(sizes)) > 1:
        told = ", ".join(f"{one.source} {size[1]}x{size[2]}" for one, size in zip(loaded, sizes, strict=True))
        reporter.log(f"images are not of one size ({told}): ratios are of sizes as well as of models")
    return sizes


def _read(path: PathLike, options: BenchOptions, reporter: Reporter) -> Checkpoint:
    bare = not str(path).startswith(TIMM_PREFIX)
    loaded = read_model(path, model=options.model if bare else None, model_args=options.model_args or None)
    loaded.model.requires_grad_(False)
    if loaded.record is not None:
        off = sorted({unit.width for unit in loaded.record.plan if unit.width % ALIGNED})
        if off:
            reporter.log(
                f"{loaded.source}: widths {', '.join(map(str, off))} are no multiples of {ALIGNED}, where "
                "kernels are fast: prune with --round-to 8"
            )
    return loaded


def _program(
    model: nn.Module, size: tuple[int, int, int], options: BenchOptions, device: torch.device, threads: int
) -> Callable[[Tensor], object]:
    """What is timed: takes float32 images on ``device``."""
    if not options.fused:
        layers: Any = model.modules()
        for layer in layers:
            if hasattr(layer, "fused_attn"):
                layer.fused_attn = False
    if options.runtime == "onnx":
        return onnx_runner(model, size, options.dtype, threads=threads)
    dtype = DTYPES[options.dtype]
    program: Callable[[Tensor], object] = model.to(device, dtype)
    if options.runtime == "compile":
        program = torch.compile(model)
    return lambda images: program(images.to(dtype))


def _timed(
    runs: Sequence[Callable[[], object]], options: BenchOptions, device: torch.device
) -> list[list[float]]:
    try:
        return take_turns(runs, seconds=options.seconds, device=device)
    except Exception as error:
        if options.runtime != "compile":
            raise
        raise MhacutError(
            f"--runtime compile: torch.compile failed ({type(error).__name__}: {error!s:.200}); on CPUs it "
            "needs a C++ compiler"
        ) from error


def _timing(
    batch_size: int,
    times: Sequence[float],
    first: Sequence[float],
    flops: int,
    first_flops: int,
    peak_mib: float | None,
) -> Timing:
    low, _, high = statistics.quantiles(times, n=4)
    ratio = statistics.median(own / other for own, other in zip(times, first, strict=True))
    saved = 1 - flops / first_flops
    return Timing(
        batch_size=batch_size,
        median_ms=1000 * statistics.median(times),
        spread_ms=1000 * (high - low) / 2,
        ratio=ratio,
        saving_realised=(1 - ratio) / saved if saved > 0 else None,
        peak_mib=peak_mib,
        runs=len(times),
    )


def _peak_mib(
    loaded: Checkpoint,
    run: Callable[[], object],
    batch_size: int,
    size: tuple[int, int, int],
    options: BenchOptions,
    device: torch.device,
    threads: int,
) -> float | None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) / 2**20
    if options.runtime != "eager" or not sys.platform.startswith("linux"):
        return None
    job = {
        "source": loaded.source,
        "model": options.model,
        "model_args": dict(options.model_args),
        "batch_size": batch_size,
        "size": size,
        "dtype": options.dtype,
        "fused": options.fused,
        "threads": threads,
    }
    command = [sys.executable, "-c", "from mhacut.commands.bench import tell_peak; tell_peak()"]
    told = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    return float(told.stdout.splitlines()[-1]) if told.returncode == 0 else None


def tell_peak() -> None:
    """Of a process of its own: read a job from stdin, run the model once, tell the process's peak in MiB."""
    job = json.load(sys.stdin)
    threads, source, batch_size = job.pop("threads"), job.pop("source"), job.pop("batch_size")
    size = tuple(job.pop("size"))
    torch.set_num_threads(threads)
    options = BenchOptions.from_flat(checkpoints=(source,), **job)
    loaded = _read(source, options, Silent())
    cpu = torch.device("cpu")
    run_of(_program(loaded.model, size, options, cpu, threads), fixed_images(batch_size, size))()
    # getrusage would do, but a child starts with its parent's peak there.
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    status = dict(line.split(":", 1) for line in lines)
    sys.stdout.write(f"{int(status['VmHWM'].split()[0]) / 1024}\n")


@contextmanager
def _threads(asked: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    if asked is not None:
        torch.set_num_threads(asked)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
