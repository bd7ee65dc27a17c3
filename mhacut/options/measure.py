"""Options of ``mhacut inspect``, ``mhacut evaluate``, ``mhacut bench`` and ``mhacut models``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from mhacut.errors import UsageError, option_name
from mhacut.limits import MAX_PARALLEL
from mhacut.options.base import (
    NEEDS_IMAGES,
    REQUIRED,
    ArchitectureOptions,
    CheckpointOptions,
    DeviceOptions,
    ExportDtype,
    ImageSource,
    LabelledImages,
    PreprocessingOptions,
    Runtime,
    seed_option,
)
from mhacut.options.option import GIVEN, Options, PathLike, option, require

Sort = Literal["layer", "flops", "params", "qk", "v", "similarity", "rank"]
INSPECTED_IMAGES = 64
"""Default number of images for the statistics of attention heads."""
_RUNS = {**NEEDS_IMAGES, "compare": GIVEN}
"""Options that make ``mhacut inspect`` run the model on images."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions(
    CheckpointOptions, ImageSource, PreprocessingOptions, DeviceOptions, panel="What is shown"
):
    layer: str | None = option(None, metavar="GLOB")
    """Show only layers whose names match GLOB, such as 'blocks.1*.attn'. All heads of these layers are
    shown."""
    heads: bool = False
    """Show the remaining channels of every attention head."""
    sort: Sort = "layer"
    """Order of the layers: model order (layer), or largest value of the named column first."""
    shapes: bool = False
    """Show channel counts and costs only. These figures come from the file header, so large files open
    fast."""
    html: PathLike | None = option(None, endings=(".html", ".htm"), metavar="FILE")
    """Write the inspection report to this HTML file."""
    overwrite: bool = option(False, needs={"html": GIVEN})
    """Replace an existing HTML report."""
    compare: PathLike | None = option(None, metavar="DENSE", reads="checkpoint")
    """Unpruned (dense) model to compare with, layer by layer. Synthetic images are used if no images are
    given."""
    train_split: str = option("train", panel="Data", needs=NEEDS_IMAGES)
    """Folder or dataset split with the images for the statistics of attention heads."""
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
            raise UsageError(
                f"{shapes} reads the file header, but the model must run for {needing}; leave out {shapes}"
            )
        if self.sort in ("similarity", "rank"):
            raise UsageError(
                f"{option_name('sort', self.sort)} reads the model's weights; leave out {shapes}"
            )

    @property
    def sees_images(self) -> bool:
        return self.has_images or self.compare is not None


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(
    CheckpointOptions, LabelledImages, PreprocessingOptions, DeviceOptions, panel="Computing"
):
    batch_size: int = option(64, at_least=1)
    """Batch size."""
    amp: bool = False
    """Compute under bfloat16 autocast."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions(ArchitectureOptions, DeviceOptions, panel="Measuring"):
    checkpoints: tuple[PathLike, ...] = option(
        REQUIRED, panel="Arguments", metavar="CHECKPOINT...", reads="checkpoint"
    )
    """Models to time, unpruned (dense) or pruned by mhacut (slim). Ratios are relative to the first model."""
    runtime: Runtime = "eager"
    """Runtime for the timing: PyTorch (eager), torch.compile, ONNX Runtime or OpenVINO."""
    int8: bool = False
    """Also time each checkpoint in INT8, with dynamic quantization in ONNX Runtime."""
    batch_sizes: tuple[int, ...] = option((1, 8), at_least=1)
    """Batch sizes at which models are timed."""
    seconds: float = option(5.0, above=0)
    """Seconds of measurement per batch size, for all checkpoints together."""
    threads: int | None = option(None, at_least=1, at_most=MAX_PARALLEL)
    """Number of CPU threads for the timing. Default: PyTorch's default."""
    dtype: ExportDtype = "float32"
    """Precision of the weights and of the computation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("checkpoints", "batch_sizes"):
            if not getattr(self, name):
                raise UsageError(f"{option_name(name)}: expected at least 1 value, found none")
        if self.int8:
            require("int8", True, self.runtime == "onnx", option_name("runtime", "onnx"))
            require("dtype", self.dtype, self.dtype == "float32", f"float32 with {option_name('int8', True)}")
        computes = self.runtime != "openvino" or self.dtype == "float32"
        require("dtype", self.dtype, computes, f"float32 with {option_name('runtime', 'openvino')}")


# Positional ``*checkpoints`` exclude a dataclass of all options, so the keywords are repeated here.
class BenchKeywords(TypedDict, total=False):
    """Keyword arguments of :func:`mhacut.bench`."""

    model: str | None
    model_args: Mapping[str, Any]
    part: str | None
    device: str
    runtime: Runtime
    int8: bool
    batch_sizes: tuple[int, ...]
    seconds: float
    threads: int | None
    dtype: ExportDtype


@dataclass(frozen=True, kw_only=True)
class ModelsOptions(Options, panel="Models"):
    pattern: str = option("*", panel="Arguments", metavar="PATTERN")
    """Pattern of architecture names, as in timm.list_models. Default: all architectures, which takes
    minutes."""
    refused: bool = False
    """List only architectures that cannot be pruned, with the reason."""
