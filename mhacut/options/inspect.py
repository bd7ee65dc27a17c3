"""Options of ``mhacut inspect``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mhacut.errors import UsageError, option_name
from mhacut.options.base import (
    CheckpointOptions,
    DeviceOptions,
    ImageSource,
    PathLike,
    PreprocessingOptions,
    seed_option,
)
from mhacut.options.option import option

Sort = Literal["layer", "flops", "params", "qk", "v", "similarity", "rank"]
INSPECTED_IMAGES = 64
"""Default number of images; some thousand tokens."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions(CheckpointOptions, ImageSource, DeviceOptions):
    """Options of ``mhacut inspect``."""

    layer: str | None = option(
        None,
        "Show only layers whose names match, head by head: 'blocks.1*.attn'.",
        panel="What is shown",
        metavar="GLOB",
    )
    heads: bool = option(
        False,
        "Show every head, and the channels it keeps or would keep at 75, 50, 25 %.",
        panel="What is shown",
    )
    sort: Sort = option(
        "layer",
        "Order of the layers: as in the model (layer), or by any other figure, the largest first.",
        panel="What is shown",
    )
    shapes: bool = option(
        False,
        "Show widths and costs from the file's header alone, without reading weights.",
        panel="What is shown",
    )
    html: PathLike | None = option(
        None,
        "Write the report as one HTML page that needs no network.",
        panel="What is shown",
        metavar="FILE",
        endings=(".html", ".htm"),
    )
    overwrite: bool = option(False, "Replace existing files.", panel="What is shown")
    compare: PathLike | None = option(
        None,
        "Compare layer by layer with the dense model that this one was pruned from; on synthetic images if "
        "none are given.",
        panel="What is shown",
        metavar="DENSE",
        reads="checkpoint",
    )
    train_split: str = option("train", "Split to take images from.", panel="Data", metavar="NAME")
    calibration_images: int | None = option(
        None,
        f"Number of images to assess heads on; {INSPECTED_IMAGES} by default.",
        panel="Data",
        metavar="N",
        at_least=1,
    )
    seed: int = seed_option("Random seed of the choice of images.", panel="Data")
    batch_size: int = option(16, "Images per batch.", panel="Computing", metavar="N", short="-b", at_least=1)
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overwrite and self.html is None:
            raise UsageError(
                f"{option_name('overwrite', True)}: nothing is written without {option_name('html')}; "
                "leave it out"
            )
        if self.shapes:
            self._require_shapes_only()
        if self.calibration_images is not None and not self.sees_images:
            raise UsageError(
                f"{option_name('calibration_images', self.calibration_images)}: there are no images; say "
                f"where they are with {option_name('data_dir')} or {option_name('dataset')}"
            )

    def idle(self) -> dict[str, str]:
        """Names of options that were changed to no effect, each with the reason."""
        found: dict[str, str] = {}
        if not self.has_images:
            found["train_split"] = "there are no images to choose from"
        if not self.sees_images:
            found |= dict.fromkeys(("seed", "batch_size", "device"), "the model is run on no images")
        return {name: reason for name, reason in found.items() if name in self.all_changed()}

    @property
    def sees_images(self) -> bool:
        """Whether the model is run on images."""
        return self.has_images or self.compare is not None

    @property
    def images_wanted(self) -> int:
        """``calibration_images``, or the default."""
        return INSPECTED_IMAGES if self.calibration_images is None else self.calibration_images

    def _require_shapes_only(self) -> None:
        """Raise unless everything asked for is known without weights."""
        shapes = option_name("shapes", True)
        others = [name for name in ("compare", "data_dir", "dataset") if getattr(self, name) is not None]
        if others:
            needing = " and ".join(map(option_name, others))
            raise UsageError(f"{shapes} reads no weights, which {needing} would need: leave one of them out")
        if self.sort in ("similarity", "rank"):
            raise UsageError(
                f"{option_name('sort', self.sort)}: is not known from shapes alone; leave {shapes} out"
            )
