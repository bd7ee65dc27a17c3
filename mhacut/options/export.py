"""Options of ``mhacut export``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, get_args

from mhacut.errors import option_name
from mhacut.limits import LICENSE
from mhacut.options.base import CheckpointOptions, ExportDtype, PathLike
from mhacut.options.option import option, require

ExportFormat = Literal["onnx", "pt2", "timm"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions(CheckpointOptions):
    """Options of ``mhacut export``."""

    format: ExportFormat = option(
        "onnx",
        "ONNX for ONNX Runtime and others, pt2 for torch.export.load, or a folder for timm and the hub.",
        panel="Result",
    )
    output: PathLike | None = option(
        None,
        "File or folder to write; by default the checkpoint's stem and the format's ending, in the "
        "working directory.",
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
        "one that the file of the weights states, if it states one.",
        panel="Result",
        metavar="NAME",
    )
    opset: int = option(
        18, "ONNX opset; 23 and later have an attention operator.", panel="Result", metavar="N", at_least=18
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output is not None:
            self._require_ending(os.fspath(self.output))
        if self.fixed_batch is not None:
            traced = f"{option_name('format', 'onnx')} or {option_name('format', 'pt2')}"
            expected = f"{traced}; timm takes any number"
            require("fixed_batch", self.fixed_batch, self.format != "timm", expected)
        if self.license is not None:
            is_name = LICENSE.fullmatch(self.license) is not None
            require("license", self.license, is_name, "a name such as apache-2.0, in lower case")
            with_card = f"{option_name('format', 'timm')}, which writes a card"
            require("license", self.license, self.format == "timm", with_card)
        known = self.format != "onnx" or self.dtype != "bfloat16"
        require("dtype", self.dtype, known, "float32 or float16: ONNX Runtime has few kernels for others")

    def _require_ending(self, output: str) -> None:
        """Raise unless the file's ending, by which other tools know it, is that of the format."""
        formats = get_args(ExportFormat)
        ending = next((name for name in formats if output.lower().endswith(f".{name}")), self.format)
        expected = f"another name, or {option_name('format', ending)}"
        require("output", output, ending == self.format, expected)
