"""Options of ``mhacut inspect``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal, get_args

from mhacut.errors import UsageError
from mhacut.options.base import (
    CheckpointOptions,
    PathLike,
    PreprocessingOptions,
    refuse_beside,
    require,
    require_choice,
    require_page,
)

Sort = Literal["layer", "flops", "params", "qk", "v", "similarity", "rank"]


@dataclass(frozen=True)
class InspectOptions(CheckpointOptions):
    """Everything ``mhacut inspect`` can be told."""

    layer: str | None = None
    """Only layers whose name fits, ``blocks.1?.attn``; heads are shown one by one."""
    heads: bool = False
    """Show heads one by one, and the channels they keep or would keep."""
    sort: Sort = "layer"
    """Order of layers, and of heads where it tells them apart: as in the model, or the largest first."""
    shapes: bool = False
    """Look at shapes alone: no weight is read."""
    html: PathLike | None = None
    """A page to write the report to."""
    png: PathLike | None = None
    """A picture to draw the report's charts on; needs ``mhacut[plot]``."""
    overwrite: bool = False
    """Replace these files if they exist."""
    compare: PathLike | None = None
    """A dense checkpoint to lay beside, layer by layer; without images, on synthetic ones."""
    data_dir: PathLike | None = None
    """Images to judge heads by: an ImageFolder with ``train/``, or a flat folder. Without, weights do."""
    dataset: str | None = None
    """A dataset as timm names it: ``hfds/NAME``, ``wds/NAME``, ``torch/NAME``, ``tfds/NAME``."""
    train_split: str = "train"
    """Split the images are taken from."""
    calibration_images: int | None = None
    """How many images; None is :data:`INSPECTED_IMAGES`."""
    seed: int = 42
    """Of the choice of images."""
    batch_size: int = 16
    """Images at a time."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:N``."""
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)

    def __post_init__(self) -> None:
        require_choice("--sort", self.sort, get_args(Sort))
        require("--batch-size", self.batch_size, self.batch_size >= 1, "at least 1")
        require("--calibration-images", self.images_wanted, self.images_wanted >= 1, "at least 1")
        if self.html is not None:
            require_page("--html", self.html)
        if self.png is not None:
            name = os.fspath(self.png)
            require("--png", name, name.lower().endswith(".png"), "a name that ends in .png")
        if self.overwrite and self.html is None and self.png is None:
            raise UsageError("--overwrite: nothing is written without --html or --png FILE; leave it out")
        if self.shapes:
            refuse_beside("--shapes", "reads no weights", self._needs_numbers())
            if self.sort in ("similarity", "rank"):
                raise UsageError(f"--sort {self.sort}: is not known from shapes alone; leave --shapes out")
        if self.calibration_images is not None and not self.sees_images:
            raise UsageError(
                f"--calibration-images {self.calibration_images}: no images are looked at; "
                "say where they are with --data-dir DIR or --dataset NAME"
            )

    @property
    def sees_images(self) -> bool:
        """Whether the model is run on images."""
        return self.data_dir is not None or self.dataset is not None or self.compare is not None

    @property
    def images_wanted(self) -> int:
        """``calibration_images``, or the default."""
        return INSPECTED_IMAGES if self.calibration_images is None else self.calibration_images

    def _needs_numbers(self) -> dict[str, bool]:
        """Flags that ask for more than shapes, and whether they were given."""
        return {
            "--compare": self.compare is not None,
            "--data-dir": self.data_dir is not None,
            "--dataset": self.dataset is not None,
        }


INSPECTED_IMAGES = 64
"""Images that ``mhacut inspect`` looks at, some thousand tokens."""
