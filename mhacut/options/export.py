"""Options of ``mhacut export``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from mhacut.errors import option_name
from mhacut.limits import LICENSE, MAX_PARALLEL, REPOSITORY
from mhacut.options.base import (
    NEEDS_IMAGES,
    CheckpointOptions,
    ExportDtype,
    ImageSource,
)
from mhacut.options.option import GIVEN, PathLike, option, require

ExportFormat = Literal["onnx", "pt2", "openvino", "timm"]
_FILE_ENDINGS: dict[str, ExportFormat] = {".onnx": "onnx", ".pt2": "pt2", ".xml": "openvino", ".timm": "timm"}


_OF_INT8 = ("threads", "data_dir", "dataset", "train_split", "calibration_images")
"""Names of the options that have an effect only with ``int8``."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(CheckpointOptions, ImageSource, panel="Result"):
    int8: bool = option(False, panel="Quantization")
    """Quantize the linear layers to INT8, and print speed, size and output errors against float32."""
    threads: int | None = option(None, panel="Quantization", at_least=1, at_most=MAX_PARALLEL)
    """Number of CPU threads for timing the INT8 model. Default: PyTorch's default."""
    train_split: str = option("train", panel="Data", needs=NEEDS_IMAGES)
    """Folder or dataset split with the calibration images for INT8."""
    calibration_images: int = option(256, panel="Data", at_least=8, needs=NEEDS_IMAGES)
    """Number of calibration images for INT8. 25 % of them are held out to compare the INT8 model with the
    float32 model."""
    format: ExportFormat = "onnx"
    """File format: onnx, pt2 (for torch.export.load), openvino (.xml and .bin), or timm (a folder for timm
    and the Hugging Face hub)."""
    output: PathLike | None = None
    """File or folder to write. Default: named after the checkpoint and the format, in the working
    directory."""
    overwrite: bool = False
    """Replace existing output files. The checkpoint is never replaced."""
    dtype: ExportDtype = "float32"
    """Precision of the exported weights. Images and logits are always float32."""
    fixed_batch: int | None = option(None, at_least=1)
    """Fixed batch size of the exported model. Default: any batch size."""
    dynamic_size: bool = False
    """Accept images of all sizes that are multiples of the patch size. Outputs are compared at half, equal
    and double height and width. Requires a model that takes several sizes."""
    license: str | None = None
    """License in the model card, by its name on the Hugging Face hub, such as apache-2.0 or mit. Default: the
    checkpoint's license."""
    push_to_hub: str | None = option(None, metavar="OWNER/NAME")
    """Upload the timm folder to this repository on the Hugging Face hub. A missing repository is created."""
    private: bool = option(False, needs={"push_to_hub": GIVEN})
    """Make the Hugging Face repository private if the upload creates it."""
    opset: int = option(18, at_least=18, needs={"format": "onnx"})
    """Version of the ONNX operator set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        output = "" if self.output is None else os.fspath(self.output).lower()
        by_ending = next((name for end, name in _FILE_ENDINGS.items() if output.endswith(end)), self.format)
        timm, onnx, xml = self.format == "timm", self.format == "onnx", output.endswith(".xml")
        bfloat16 = self.dtype == "bfloat16" and self.format in ("onnx", "openvino")
        int8 = option_name("int8", True)
        card = f"{option_name('format', 'timm')}, the only format with a model card"
        rules = [
            ("output", by_ending == self.format, f"another name, or {option_name('format', by_ending)}"),
            ("output", not output or self.format != "openvino" or xml, "a name that ends in .xml"),
            (
                "fixed_batch",
                self.fixed_batch is None or not timm,
                "another format: timm takes any batch size",
            ),
            ("dynamic_size", not self.dynamic_size or onnx or self.format == "pt2", "format onnx or pt2"),
            ("dynamic_size", not (self.dynamic_size and self.int8), f"no {int8}"),
            ("license", LICENSE.fullmatch(self.license or "mit"), "a name such as apache-2.0, in lower case"),
            ("license", self.license is None or timm, card),
            ("push_to_hub", REPOSITORY.fullmatch(self.push_to_hub or "a/b"), "OWNER/NAME"),
            ("push_to_hub", self.push_to_hub is None or timm, card),
            ("dtype", not bfloat16, "float32 or float16: ONNX Runtime has few bfloat16 kernels"),
            ("int8", not self.int8 or onnx, option_name("format", "onnx")),
            ("dtype", not self.int8 or self.dtype == "float32", f"float32 with {int8}"),
            *((name, self.int8 or name not in _OF_INT8, int8) for name in self.changed()),
        ]
        for name, holds, expected in rules:
            require(name, getattr(self, name), bool(holds), expected)
