"""``mhacut export`` as a function: write a checkpoint for another program, and compare the outputs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.huggingface import is_huggingface
from mhacut.checkpoint.load import open_from_options
from mhacut.checkpoint.preprocessing import resolve_preprocessing
from mhacut.data import Preprocessing
from mhacut.errors import MhacutError, UsageError, option_name
from mhacut.exporting.quantize import Quantization, quantize_and_compare
from mhacut.exporting.runtimes import (
    ENDINGS,
    RUNTIMES,
    Runner,
    in_dtype,
    patch_side,
    refusing,
    require_packages,
    weights_file,
    write_ir,
)
from mhacut.exporting.timm_folder import FILES, check_folder, check_hub, push_folder, write_folder
from mhacut.options.base import PathLike, PreprocessingOptions
from mhacut.options.export import ExportOptions
from mhacut.options.option import takes_keywords
from mhacut.runtime.device import default_torch
from mhacut.runtime.files import check_outputs, write_file
from mhacut.runtime.progress import Reporter, Reporting, reporting

_BATCH_SIZES = (1, 2, 5)
"""Batch sizes at which an exported model without a fixed batch size is compared with the original."""
TOLERANCE: Mapping[str, float] = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest accepted difference from the float32 model's outputs, relative to the largest output, by dtype."""


@dataclass(frozen=True)
class ExportResult:
    """Result of :func:`export`."""

    output: Path
    """Path of the exported file, or of the folder for format ``timm``."""
    format: str
    architecture: str
    dtype: str
    input_size: tuple[int, int, int]
    """Shape of 1 input image, [C, H, W]."""
    compared_sizes: tuple[tuple[int, int, int], ...]
    """Shapes of 1 input image, [C, H, W], at which outputs were compared."""
    fixed_batch: int | None
    preprocessing: Mapping[str, Any]
    """Preprocessing that images need. The exported file contains the same values."""
    file_bytes: int
    """Size of the exported file, or of all files in the exported folder."""
    difference: Mapping[int, float]
    """Largest difference from the original's outputs, relative to the largest output, by batch size. Without
    INT8, a large difference is an error."""
    int8: Quantization | None = None
    """Comparison of the INT8 model with the float32 model. None without INT8."""
    pushed: str | None = None
    """Address of the uploaded commit on the Hugging Face hub. None without an upload."""


@dataclass(frozen=True)
class _ExportCall(Reporting, ExportOptions):
    checkpoint: PathLike


@default_torch()
@takes_keywords(_ExportCall)
def export(
    checkpoint: PathLike,
    *,
    progress: bool | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> ExportResult:
    """Export a dense or slim checkpoint, and compare the exported model's outputs with the checkpoint's.

    Args:
        checkpoint: a file or name that ``mhacut prune`` reads or writes.
        progress: show a progress bar. Default: in notebooks and terminals.
        reporter: receives progress and messages instead of a bar.
        options: options of the command line, listed below by ``help()``.

    Raises:
        MhacutError: a subclass in :mod:`mhacut.errors`. If only the upload failed, the exported files stay.
    """
    with reporting(reporter, progress) as shown:
        return run_export(ExportOptions.of(checkpoint=checkpoint, **options), shown)


def run_export(options: ExportOptions, reporter: Reporter) -> ExportResult:
    require_packages(option_name("format", options.format), options.format)
    if options.push_to_hub is not None:
        check_hub(options)
    if options.output is not None:
        _check(Path(options.output), options, Path(options.checkpoint))
    reporter.start("reading")
    for note in options.unmet_needs().values():
        reporter.log(note)
    loaded = open_from_options(options, reporter)
    if options.format == "timm" and is_huggingface(loaded):
        timm = option_name("format", "timm")
        raise UsageError(f"{timm}: expected a timm model, but {loaded.source} holds a model of transformers")
    target = Path(options.output or f"{loaded.stem}{ENDINGS[options.format]}")
    _check(target, options, loaded.path)
    loaded.model.requires_grad_(False)
    preprocessing = resolve_preprocessing(loaded, PreprocessingOptions())
    sizes = _sizes(loaded, preprocessing.input_size, options)
    differences, quantized = _write(target, loaded, preprocessing, sizes, options, reporter)
    pushed = None
    if options.push_to_hub is not None:
        reporter.start("pushing")
        pushed = push_folder(target, options)
    return ExportResult(
        output=target,
        format=options.format,
        architecture=loaded.identity.architecture,
        dtype=options.dtype,
        input_size=preprocessing.input_size,
        compared_sizes=sizes,
        fixed_batch=options.fixed_batch,
        preprocessing=preprocessing.to_json(),
        file_bytes=sum(file.stat().st_size for file in _files(target, options) if file.is_file()),
        difference=differences,
        int8=quantized,
        pushed=pushed,
    )


@torch.no_grad()
def _sizes(
    loaded: Checkpoint, size: tuple[int, int, int], options: ExportOptions
) -> tuple[tuple[int, int, int], ...]:
    """Return the image sizes to compare, or raise :class:`MhacutError` if the model rejects one."""
    if not options.dynamic_size:
        return (size,)
    channels, *own = size
    patch = patch_side(loaded.model)
    half = [max(side // patch // 2, 2) * patch for side in own]
    sizes = tuple((channels, height, width) for height, width in (half, own, [2 * side for side in own]))
    for other in sizes:
        shape = "x".join(map(str, other))
        advice = "timm's ViTs take all sizes with the model argument dynamic_img_size=True"
        what = f"{option_name('dynamic_size', True)}: {loaded.identity.architecture} does not take {shape}"
        with refusing(what, advice):
            loaded.model(torch.zeros(1, *other))
    return sizes


def _write(
    target: Path,
    loaded: Checkpoint,
    preprocessing: Preprocessing,
    sizes: tuple[tuple[int, int, int], ...],
    options: ExportOptions,
    reporter: Reporter,
) -> tuple[dict[int, float], Quantization | None]:
    """Write the exported model. Return its output differences by batch size, and the INT8 comparison."""
    model, size = loaded.model, preprocessing.input_size
    history = () if loaded.record is None else loaded.record.history
    stated = {"architecture": loaded.identity.architecture, "preprocessing": preprocessing.to_json()}
    about = json.dumps({**stated, "history": [dict(entry) for entry in history]}, sort_keys=True)
    differences: dict[int, float] = {}
    quantized: list[Quantization] = []

    def compare(run: Runner) -> None:
        reporter.start("comparing")
        differences.update(_differences(model, run, sizes, options, TOLERANCE[options.dtype]))

    def write(temporary: Path) -> None:
        content, run = RUNTIMES[options.format](in_dtype(model, options.dtype), size, about, options)
        compare(run)
        if options.int8:
            reporter.start("quantizing")
            content, run, measured = quantize_and_compare(
                content, model, preprocessing, options, reporter.log
            )
            quantized.append(measured)
            differences.update(_differences(model, run, sizes, options, math.inf))
        temporary.write_bytes(content)

    reporter.start("exporting")
    if options.format == "timm":
        write_folder(target, loaded, preprocessing, options, compare, reporter.log)
    elif options.format == "openvino":
        write_ir(target, model, size, about, options, input_path=loaded.path, compare=compare)
    else:
        write_file(target, write, overwrite=options.overwrite, input_path=loaded.path)
    return differences, quantized[0] if quantized else None


def _files(target: Path, options: ExportOptions) -> list[Path]:
    if options.format == "timm":
        return [target / name for name in FILES]
    return [target, weights_file(target)] if options.format == "openvino" else [target]


def _check(target: Path, options: ExportOptions, input_path: Path | None) -> None:
    if options.format == "timm":
        check_folder(target, overwrite=options.overwrite, input_path=input_path)
    else:
        files = _files(target, options)
        check_outputs(files, overwrite=options.overwrite, input_paths=(input_path,))


@torch.no_grad()
def _differences(
    model: nn.Module,
    run: Runner,
    sizes: tuple[tuple[int, int, int], ...],
    options: ExportOptions,
    bound: float,
) -> dict[int, float]:
    """Return the largest output difference of ``run`` and ``model`` by batch size, relative to the outputs.

    A relative difference above ``bound``, or NaN, is an error.
    """
    generator = torch.Generator().manual_seed(0)
    differences: dict[int, float] = {}
    counts = _BATCH_SIZES if options.fixed_batch is None else (options.fixed_batch,)
    for count, size in product(counts, sizes):
        images, shape = torch.randn(count, *size, generator=generator), "x".join(map(str, size))
        expected = model(images)
        largest = expected.abs().max().clamp_min(1e-12)
        # torch.export may add conditions on the image size, which pt2 files check.
        what = f"the exported {options.format} model refuses {count} images of {shape}"
        with refusing(what, f"nothing was written; try {option_name('format', 'onnx')}"):
            outputs = run(images)
        difference = float((outputs - expected).abs().max() / largest)
        differences[count] = max(difference, differences.get(count, 0.0))
        if not difference <= bound:  # also NaN
            hint = f"; try {option_name('dtype', 'float32')}" if options.dtype != "float32" else ""
            raise MhacutError(
                f"the exported {options.format} model differs from the original by {difference:.1e} "
                f"of the largest output at batch size {count} and image size {shape}, expected at most "
                f"{bound:g} in {options.dtype}; nothing was written{hint}"
            )
    return differences
