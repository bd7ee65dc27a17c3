"""Options of ``mhacut export``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from mhacut.errors import option_name
from mhacut.limits import LICENSE, REPOSITORY
from mhacut.options.base import (
    NEEDS_IMAGES,
    CheckpointOptions,
    ExportDtype,
    ImageSource,
    ModelOptions,
    threads_option,
)
from mhacut.options.option import GIVEN, Options, PathLike, option, require

ExportFormat = Literal["onnx", "pt2", "openvino", "timm"]
QuantizationMethod = Literal["dynamic", "static"]
_FILE_ENDINGS: dict[str, ExportFormat] = {".onnx": "onnx", ".pt2": "pt2", ".xml": "openvino", ".timm": "timm"}


@dataclass(frozen=True, kw_only=True)
class QuantizationImages(ImageSource, panel="Data", needs=NEEDS_IMAGES):
    """Images to compare INT8 with float32 on; without any, the two are compared on noise."""

    train_split: str = "train"
    """Split to take images from."""
    calibration_images: int = option(256, at_least=8)
    """Number of images to look for outliers and find static ranges on; a quarter of them is held out for the
    comparison with float32."""


@dataclass(frozen=True, kw_only=True)
class QuantizationOptions(Options, panel="Quantization"):
    """Quantization of an ONNX file."""

    int8: bool = False
    """Quantize the weights of linear layers to INT8, and compare speed, size and outputs with float32."""
    quantization: QuantizationMethod = "dynamic"
    """Ranges of activations: found as the file runs (dynamic), or fixed on images (static), as NPUs need."""
    reduce_range: bool = False
    """Quantize weights to 7 bits; with 8 bits, sums overflow on x86 CPUs without VNNI."""
    threads: int | None = threads_option()
    """CPU threads to time INT8 with; by default torch's own choice."""


@dataclass(frozen=True, kw_only=True)
class ExportKeywords(ModelOptions, QuantizationOptions, QuantizationImages, panel="Result"):
    """Keywords of :func:`mhacut.export`."""

    format: ExportFormat = "onnx"
    """ONNX for ONNX Runtime and others, pt2 for torch.export.load, OpenVINO IR (.xml and .bin), or a folder
    for timm and the hub."""
    output: PathLike | None = None
    """File or folder to write; by default named after the checkpoint and the format, in the working
    directory."""
    overwrite: bool = False
    """Replace an existing file; the checkpoint is never replaced."""
    dtype: ExportDtype = "float32"
    """Precision of the weights; images and logits are always float32."""
    fixed_batch: int | None = option(None, at_least=1)
    """Images per batch; by default any number."""
    license: str | None = None
    """License to state in the model card, by its name on the hub (apache-2.0, mit, ...); by default the one
    that the checkpoint states, if any."""
    push_to_hub: str | None = option(None, metavar="OWNER/NAME")
    """Push the folder to this repository on the Hugging Face hub; the repository is created if it does not
    exist."""
    private: bool = option(False, needs={"push_to_hub": GIVEN})
    """If the repository is created, make it private."""
    opset: int = option(18, at_least=18, needs={"format": "onnx"})
    """ONNX opset."""

    def __post_init__(self) -> None:
        super().__post_init__()
        output = "" if self.output is None else os.fspath(self.output).lower()
        by_ending = next((name for end, name in _FILE_ENDINGS.items() if output.endswith(end)), self.format)
        expected = f"another name, or {option_name('format', by_ending)}"
        require("output", self.output, by_ending == self.format, expected)
        named = not output or self.format != "openvino" or output.endswith(".xml")
        require("output", self.output, named, "a name that ends in .xml; the weights are in .bin beside it")
        batched = self.fixed_batch is None or self.format != "timm"
        require("fixed_batch", self.fixed_batch, batched, "another format: timm takes any number of images")
        for name, pattern, expected in (
            ("license", LICENSE, "a name such as apache-2.0, in lower case"),
            ("push_to_hub", REPOSITORY, "OWNER/NAME"),
        ):
            value = getattr(self, name)
            if value is not None:
                require(name, value, pattern.fullmatch(value) is not None, expected)
                card = f"{option_name('format', 'timm')}, which writes a card"
                require(name, value, self.format == "timm", card)
        known = self.format not in ("onnx", "openvino") or self.dtype != "bfloat16"
        require("dtype", self.dtype, known, "float32 or float16: ONNX Runtime has few kernels for others")
        if self.int8:
            require("int8", True, self.format == "onnx", option_name("format", "onnx"))
            require("dtype", self.dtype, self.dtype == "float32", f"float32 with {option_name('int8', True)}")
            found = self.quantization == "dynamic" or self.has_images
            require("quantization", self.quantization, found, f"images ({option_name('data_dir')}) with it")
        for name in self.changed():  # whoever gives them wants a quantized file
            quantizes = name in QuantizationOptions.options() or name in QuantizationImages.options()
            require(name, getattr(self, name), self.int8 or not quantizes, option_name("int8", True))


@dataclass(frozen=True, kw_only=True)
class ExportOptions(ExportKeywords, CheckpointOptions):
    """Options of ``mhacut export``."""
