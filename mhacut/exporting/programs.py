"""Models, and single layers, as programs of the runtimes in which latency is measured."""

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
    """Conditions that models are timed under."""

    runtime: Runtime
    device: torch.device
    threads: int
    """Number of CPU threads."""
    dtype: ExportDtype = "float32"
    """Type that whole models compute in; OpenVINO and single layers compute in float32."""


def timing_device(runtime: Runtime, device: str) -> torch.device:
    """Return the device on which ``runtime`` computes."""
    if runtime not in ("onnx", "openvino"):
        return resolve_device(device)
    asked = option_name("runtime", runtime)
    require_packages(asked, runtime)
    if device not in ("auto", "cpu"):
        raise UsageError(f"{option_name('device', device)}: {asked} is measured on the CPU only")
    return torch.device("cpu")


def model_program(
    model: nn.Module, size: tuple[int, int, int], conditions: Conditions
) -> Callable[[Tensor], object]:
    """Return ``model`` as a function of float32 images on the device, of any batch size."""
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
    """Return ``model`` with its linear layers in INT8, as ``mhacut export --int8`` quantizes without images.

    Layers whose inputs have outliers for images of noise stay float32.
    """
    content = onnx_content(model, size)
    fragile = layers_with_outliers(content, [fixed_images(4, size)])
    content = quantize(content, exclude=fragile)
    return onnx_runner(content, threads), len(content)


def part_run(
    part: nn.Module, inputs: tuple[Tensor, ...], conditions: Conditions, *, int8: bool = False
) -> Callable[[], object]:
    """Return a function that runs a part of a model once, on ``inputs`` on the CPU, in float32."""
    if conditions.runtime in ("onnx", "openvino"):
        content = part_content(part, inputs)
        if conditions.runtime == "openvino":
            return openvino_program(content, inputs, conditions.threads)
        if int8:
            # Outliers are not looked for: a part is run on noise, in which there are none.
            with suppress(NothingToQuantizeError):  # it stays float32 in the model too
                content = quantize(content)
        return onnx_program(content, inputs, conditions.threads)
    placed: Callable[..., object] = part.to(conditions.device)
    if conditions.runtime == "compile":
        placed = torch.compile(part)
    on_device = tuple(tensor.to(conditions.device) for tensor in inputs)
    return run_of(lambda _: placed(*on_device), on_device[0])


@contextmanager
def using_threads(asked: int | None) -> Iterator[int]:
    """A block in which torch computes with ``asked`` CPU threads; yields their number."""
    before = torch.get_num_threads()
    if asked is not None:
        torch.set_num_threads(asked)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
