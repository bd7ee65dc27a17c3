"""Options of ``mhacut export``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from mhacut.errors import option_name
from mhacut.limits import LICENSE, MAX_PARALLEL, REPOSITORY
from mhacut.options.base import CheckpointOptions, ExportDtype, ImageSource, PathLike
from mhacut.options.option import option, require

ExportFormat = Literal["onnx", "pt2", "openvino", "timm"]
_FILE_ENDINGS: dict[str, ExportFormat] = {".onnx": "onnx", ".pt2": "pt2", ".xml": "openvino", ".timm": "timm"}


@dataclass(frozen=True, kw_only=True)
class QuantizationImages(ImageSource):
    """Images to compare INT8 with float32 on; without any, the two are compared on noise."""

    train_split: str = option("train", "Split to take images from.", panel="Data", metavar="NAME")
    calibration_images: int = option(
        256,
        "Number of images to look for outliers on; a quarter of them is held out for the comparison with "
        "float32.",
        panel="Data",
        metavar="N",
        at_least=8,
    )


@dataclass(frozen=True, kw_only=True)
class ExportOptions(CheckpointOptions):
    """Options of ``mhacut export``."""

    format: ExportFormat = option(
        "onnx",
        "ONNX for ONNX Runtime and others, pt2 for torch.export.load, OpenVINO IR (.xml and .bin), or a "
        "folder for timm and the hub.",
        panel="Result",
    )
    output: PathLike | None = option(
        None,
        "File or folder to write; by default named after the checkpoint and the format, in the working "
        "directory.",
        panel="Result",
        metavar="PATH",
        short="-o",
    )
    overwrite: bool = option(
        False, "Replace an existing file; the checkpoint is never replaced.", panel="Result"
    )
    dtype: ExportDtype = option(
        "float32", "Precision of the weights; images and logits are always float32.", panel="Result"
    )
    fixed_batch: int | None = option(
        None, "Images per batch; by default any number.", panel="Result", metavar="N", at_least=1
    )
    license: str | None = option(
        None,
        "License to state in the model card, by its name on the hub (apache-2.0, mit, ...); by default the "
        "one that the checkpoint states, if any.",
        panel="Result",
        metavar="NAME",
    )
    push_to_hub: str | None = option(
        None,
        "Push the folder to this repository on the Hugging Face hub; the repository is created if it does "
        "not exist.",
        panel="Result",
        metavar="OWNER/NAME",
    )
    private: bool = option(False, "If the repository is created, make it private.", panel="Result")
    opset: int = option(
        18,
        "ONNX opset.",
        panel="Result",
        metavar="N",
        at_least=18,
    )
    int8: bool = option(
        False,
        "Quantize the weights of linear layers to INT8, and compare speed, size and outputs with float32.",
        panel="Quantization",
    )
    reduce_range: bool = option(
        False,
        "Quantize weights to 7 bits; with 8 bits, sums overflow on x86 CPUs without VNNI.",
        panel="Quantization",
    )
    threads: int | None = option(
        None,
        "CPU threads to time INT8 with; by default torch's own choice.",
        panel="Quantization",
        metavar="N",
        at_least=1,
        at_most=MAX_PARALLEL,
    )
    data: QuantizationImages = field(default_factory=QuantizationImages)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output is not None:
            self._require_ending(os.fspath(self.output))
        if self.fixed_batch is not None:
            traced = ", ".join(option_name("format", name) for name in ("onnx", "openvino", "pt2"))
            expected = f"one of {traced}; timm takes any number"
            require("fixed_batch", self.fixed_batch, self.format != "timm", expected)
        if self.license is not None:
            is_name = LICENSE.fullmatch(self.license) is not None
            require("license", self.license, is_name, "a name such as apache-2.0, in lower case")
            with_card = f"{option_name('format', 'timm')}, which writes a card"
            require("license", self.license, self.format == "timm", with_card)
        if self.push_to_hub is not None:
            is_name = REPOSITORY.fullmatch(self.push_to_hub) is not None
            require("push_to_hub", self.push_to_hub, is_name, "OWNER/NAME")
            folder = option_name("format", "timm")
            require("push_to_hub", self.push_to_hub, self.format == "timm", f"{folder}, which writes a card")
        pushes = self.push_to_hub is not None or not self.private
        require("private", self.private, pushes, f"{option_name('push_to_hub', 'OWNER/NAME')} with it")
        known = self.format not in ("onnx", "openvino") or self.dtype != "bfloat16"
        require("dtype", self.dtype, known, "float32 or float16: ONNX Runtime has few kernels for others")
        ir = self.format == "openvino" and self.output is not None
        named = not ir or os.fspath(self.output or "").lower().endswith(".xml")
        require("output", self.output, named, "a name that ends in .xml; the weights are in .bin beside it")
        self._check_quantization()

    def idle(self) -> dict[str, str]:
        """Names of options that were changed to no effect, each with the reason."""
        found: dict[str, str] = {}
        if self.format != "onnx" and "opset" in self.changed():
            found["opset"] = f"{option_name('format', self.format)} has none"
        if not self.data.has_images:
            reason = f"there are no images without {option_name('data_dir')} or {option_name('dataset')}"
            found |= dict.fromkeys(self.data.changed(), reason)
        return found

    def _check_quantization(self) -> None:
        """Raise unless the options of INT8 fit together."""
        if self.int8:
            require("int8", True, self.format == "onnx", option_name("format", "onnx"))
            require("dtype", self.dtype, self.dtype == "float32", f"float32 with {option_name('int8', True)}")
            return
        own = {name: getattr(self, name) for name in ("reduce_range", "threads")}
        for name, value in (own | self.data.flat()).items():
            unchanged = value == type(self).options()[name].default
            require(name, value, unchanged, f"{option_name('int8', True)} with it")

    def _require_ending(self, output: str) -> None:
        """Raise unless the file's ending, by which other tools know it, is that of the format."""
        known = (name for ending, name in _FILE_ENDINGS.items() if output.lower().endswith(ending))
        by_ending = next(known, self.format)
        expected = f"another name, or {option_name('format', by_ending)}"
        require("output", output, by_ending == self.format, expected)
