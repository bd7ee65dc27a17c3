"""Options of ``mhacut inspect``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mhacut.errors import UsageError, option_name
from mhacut.options.base import (
    NEEDS_IMAGES,
    CheckpointOptions,
    DeviceOptions,
    ImageSource,
    PreprocessingOptions,
    seed_option,
)
from mhacut.options.option import GIVEN, PathLike, option

Sort = Literal["layer", "flops", "params", "qk", "v", "similarity", "rank"]
INSPECTED_IMAGES = 64
"""Default number of images for head statistics, enough for thousands of tokens."""
_RUNS = {**NEEDS_IMAGES, "compare": GIVEN}
"""Options that make ``mhacut inspect`` run the model on images."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions(
    CheckpointOptions, ImageSource, PreprocessingOptions, DeviceOptions, panel="What is shown"
):
    layer: str | None = option(None, metavar="GLOB")
    """Show only layers whose names match GLOB, such as 'blocks.1*.attn', with all heads."""
    heads: bool = False
    """Show every head and its remaining channels."""
    sort: Sort = "layer"
    """Order of the layers: model order (layer), or largest value of the named column first."""
    shapes: bool = False
    """Show channel counts and costs only. Both come from the file header, so large files open fast."""
    html: PathLike | None = option(None, endings=(".html", ".htm"), metavar="FILE")
    """Write the report to this HTML file."""
    overwrite: bool = option(False, needs={"html": GIVEN})
    """Replace an existing HTML page."""
    compare: PathLike | None = option(None, metavar="DENSE", reads="checkpoint")
    """Unpruned (dense) model to compare with, layer by layer. Without images, synthetic images are used."""
    train_split: str = option("train", panel="Data", needs=NEEDS_IMAGES)
    """Name of the split with the images for head statistics."""
    calibration_images: int = option(INSPECTED_IMAGES, at_least=1, panel="Data", needs=_RUNS)
    """Number of images for the statistics of attention heads."""
    seed: int = seed_option()
    """Random seed for choosing images."""
    batch_size: int = option(16, at_least=1, panel="Computing", needs=_RUNS)
    """Batch size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shapes:
            return
        shapes = option_name("shapes", True)
        others = [name for name in ("compare", "data_dir", "dataset") if getattr(self, name) is not None]
        if others:
            needing = " and ".join(map(option_name, others))
            raise UsageError(f"{shapes} cannot be combined with {needing}, because the model must run")
        if self.sort in ("similarity", "rank"):
            raise UsageError(f"{option_name('sort', self.sort)} needs weights; leave out {shapes}")

    @property
    def sees_images(self) -> bool:
        return self.has_images or self.compare is not None
