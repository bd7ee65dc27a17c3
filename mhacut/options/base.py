"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mhacut.limits import MAX_PARALLEL
from mhacut.options.option import REQUIRED, Options, Panel, option

ExportDtype = Literal["float32", "float16", "bfloat16"]
PathLike = str | os.PathLike[str]
IN_MEMORY = ""
"""Placeholder for the checkpoint of a command that is given a module."""
_HIGHEST_RATE = 1e36
"""Learning rates above it overflow float32 in Adam's first step, which divides them by 0.1."""


def seed_option(help: str, *, panel: Panel) -> int:
    """State a random seed; torch takes the numbers within these bounds."""
    return option(42, help, panel=panel, metavar="N", at_least=-(2**63), at_most=2**64 - 1)


def rate_option(default: float, help: str, *, panel: Panel, or_zero: bool = False) -> float:
    """State a learning rate, above 0 unless it may be 0 too."""
    least, above = (0, None) if or_zero else (None, 0)
    return option(
        default, help, panel=panel, metavar="RATE", at_least=least, above=above, at_most=_HIGHEST_RATE
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Architecture of checkpoints that do not state it, and the part of them that holds the model."""

    model: str | None = option(
        None,
        "timm architecture, if the file does not state it.",
        panel="Model",
        metavar="NAME",
        short="-m",
    )
    model_args: Mapping[str, Any] = option(
        {},
        "Arguments of that architecture, such as img_size=32 depth=6.",
        panel="Model",
        metavar="KEY=VALUE",
    )
    part: str | None = option(
        None,
        "Part of a training checkpoint that holds the model: state_dict, student, backbone, ...",
        panel="Model",
        metavar="NAME",
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(ModelOptions):
    """Checkpoint, and facts that its file does not state."""

    checkpoint: PathLike = option(
        REQUIRED,
        "A .safetensors or .pth file, dense or slim, a timm folder, timm:NAME, or hf-hub:OWNER/NAME.",
        panel="Arguments",
        metavar="CHECKPOINT",
        reads="checkpoint",
    )
    num_classes: int | None = option(
        None,
        "Refuse a dense model whose classifier has not N classes; 0 leaves the classifier out.",
        panel="Model",
        metavar="N",
        at_least=0,
    )


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options):
    """Device that computes."""

    device: str = option("auto", "auto, cpu, cuda or cuda:N.", panel="Computing", metavar="NAME")

    def __post_init__(self) -> None:
        if self.device is not None:
            object.__setattr__(self, "device", str(self.device))  # torch.device("cpu") is one, too
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class ImageSource(Options):
    """Source of images."""

    data_dir: PathLike | None = option(
        None,
        "Folder with train/ and val/, a folder of class folders or, where no labels are needed, of images.",
        panel="Data",
        metavar="DIR",
        reads="data_dir",
    )
    dataset: str | None = option(
        None,
        "Dataset by its name in timm: hfds/NAME, wds/NAME, tfds/NAME, torch/NAME.",
        panel="Data",
        metavar="NAME",
    )

    @property
    def has_images(self) -> bool:
        """Whether a source is given."""
        return self.data_dir is not None or self.dataset is not None


@dataclass(frozen=True, kw_only=True)
class LabelledImages(ImageSource):
    """Source of images to measure accuracy on."""

    class_map: PathLike | None = option(
        None,
        "Text file with the class names in the order of the model's head.",
        panel="Data",
        metavar="FILE",
        reads="class_map",
    )
    val_split: str = option("val", "Split to measure accuracy on.", panel="Data", metavar="NAME")
    workers: int | None = option(
        None,
        "Processes that load images; by default 2, or 1 where there is only one CPU.",
        panel="Data",
        metavar="N",
        short="-j",
        at_least=0,
        at_most=MAX_PARALLEL,
    )


@dataclass(frozen=True, kw_only=True)
class DataOptions(LabelledImages):
    """Source of images to measure accuracy on, and of those to calibrate or train on."""

    train_split: str = option("train", "Split to calibrate or train on.", panel="Data", metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class PreprocessingOptions(Options):
    """Overrides of the checkpoint's own preprocessing; None keeps the checkpoint's value."""

    mean: tuple[float, ...] | None = option(
        None,
        "Mean per channel, for pixels in 0..1; by default the model's own.",
        panel="Preprocessing",
        metavar="A,B,C",
    )
    std: tuple[float, ...] | None = option(
        None,
        "Standard deviation per channel; by default the model's own.",
        panel="Preprocessing",
        metavar="A,B,C",
    )
    crop_pct: float | None = option(
        None, "Share of the image that the centre crop keeps.", panel="Preprocessing", metavar="SHARE"
    )
    interpolation: str | None = option(
        None, "Interpolation on resizing: bicubic, bilinear, ...", panel="Preprocessing", metavar="NAME"
    )
    img_size: int | None = option(None, "Height and width in pixels.", panel="Preprocessing", metavar="N")

    @property
    def given(self) -> frozenset[str]:
        """Names of the options that are given."""
        return frozenset(name for name in self.options() if getattr(self, name) is not None)
