"""Functions that run models or layers in a runtime, for measuring latency."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mhacut.errors import UsageError, option_name
from mhacut.exporting.quantize import NothingToQuantizeError, layers_with_outliers, quantize
from mhacut.exporting.runtimes import (
    DTYPES,
    in_dtype,
    onnx_content,
    onnx_program,
    onnx_runner,
    openvino_program,
    openvino_runner,
    part_content,
    require_packages,
)
from mhacut.measuring.latency import fixed_images, run_of
from mhacut.options.base import ExportDtype, Runtime
from mhacut.runtime.device import resolve_device


@dataclass(frozen=True)
class Conditions:
    runtime: Runtime
    device: torch.device
    threads: int
    dtype: ExportDtype = "float32"
    """Dtype of models in PyTorch and ONNX Runtime. OpenVINO and single layers always use float32."""


def timing_device(runtime: Runtime, device: str) -> torch.device:
    if runtime not in ("onnx", "openvino"):
        return resolve_device(device)
    option = option_name("runtime", runtime)
    require_packages(option, runtime)
    if device not in ("auto", "cpu"):
        raise UsageError(f"{option_name('device', device)}: {option} is measured on the CPU only")
    return torch.device("cpu")


def model_program(
    model: nn.Module, size: tuple[int, int, int], conditions: Conditions
) -> Callable[[Tensor], object]:
    """Return a function of float32 images [B, C, H, W] that runs ``model`` in the chosen runtime."""
    if conditions.runtime == "openvino":
        return openvino_runner(model, size, threads=conditions.threads)
    if conditions.runtime == "onnx":
        return onnx_runner(onnx_content(in_dtype(model, conditions.dtype), size), conditions.threads)
    dtype = DTYPES[conditions.dtype]
    program: Callable[[Tensor], object] = model.to(conditions.device, dtype)
    if conditions.runtime == "compile":
        program = torch.compile(model)
    return lambda images: program(images.to(dtype))


def int8_program(
    model: nn.Module, size: tuple[int, int, int], threads: int
) -> tuple[Callable[[Tensor], object], int]:
    """Return a function of images that runs ``model`` as INT8 ONNX, and the ONNX file's size in bytes."""
    content = onnx_content(model, size)
    # On noise, as ``mhacut export --int8`` does without images.
    outlier_layers = layers_with_outliers(content, [fixed_images(4, size)])
    content = quantize(content, exclude=outlier_layers)
    return onnx_runner(content, threads), len(content)


def part_run(
    part: nn.Module, inputs: tuple[Tensor, ...], conditions: Conditions, *, int8: bool = False
) -> Callable[[], object]:
    """Return a function that runs the submodule ``part`` once on ``inputs``, which are CPU tensors."""
    if conditions.runtime in ("onnx", "openvino"):
        content = part_content(part, inputs)
        if conditions.runtime == "openvino":
            return openvino_program(content, inputs, conditions.threads)
        if int8:
            # No search for outliers: the inputs are noise and have no outliers.
            with suppress(NothingToQuantizeError):  # the model keeps such layers in float32 too
                content = quantize(content)
        return onnx_program(content, inputs, conditions.threads)
    placed: Callable[..., object] = part.to(conditions.device)
    if conditions.runtime == "compile":
        placed = torch.compile(part)
    on_device = tuple(tensor.to(conditions.device) for tensor in inputs)
    return run_of(lambda _: placed(*on_device), on_device[0])


@contextmanager
def using_threads(threads: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
