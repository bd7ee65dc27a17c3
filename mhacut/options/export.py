"""Options of ``mhacut export``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, get_args

from mhacut.options.base import CheckpointOptions, ExportDtype, PathLike, require, require_choice

ExportFormat = Literal["onnx", "pt2", "timm"]


@dataclass(frozen=True)
class ExportOptions(CheckpointOptions):
    """Everything ``mhacut export`` can be told."""

    format: ExportFormat = "onnx"
    """``onnx`` for ONNX Runtime, ``pt2`` for ``torch.export.load``, ``timm`` for a folder of timm's."""
    output: PathLike | None = None
    """What to write; None is the checkpoint's stem and the format's ending in the working directory."""
    overwrite: bool = False
    """Replace an existing file; the input is never replaced."""
    dtype: ExportDtype = "float32"
    """What the file computes in; images and answers are float32 whatever it is."""
    fixed_batch: int | None = None
    """Images at a time; None is any number."""
    opset: int = 18
    """Of ONNX; 23 and later have an operator for attention."""

    def __post_init__(self) -> None:
        require_choice("--format", self.format, get_args(ExportFormat))
        require_choice("--dtype", self.dtype, get_args(ExportDtype))
        if self.output is not None:
            self._require_ending(os.fspath(self.output))
        require("--opset", self.opset, self.opset >= 18, "at least 18")
        if self.fixed_batch is not None:
            require("--fixed-batch", self.fixed_batch, self.fixed_batch >= 1, "at least 1")
            traced = self.format != "timm"
            require("--fixed-batch", self.fixed_batch, traced, "--format onnx or pt2; timm takes any number")
        known = self.format != "onnx" or self.dtype != "bfloat16"
        require("--dtype", self.dtype, known, "float32 or float16: ONNX Runtime has few kernels for others")

    def _require_ending(self, output: str) -> None:
        """What other tools tell a file by must not name another format."""
        formats = get_args(ExportFormat)
        told = next((name for name in formats if output.lower().endswith(f".{name}")), self.format)
        require("--output", output, told == self.format, f"another name, or --format {told}")
