"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

from mhacut.limits import MAX_PARALLEL
from mhacut.options.option import GIVEN, Options, PathLike, option

__all__ = ["PathLike"]
Runtime = Literal["eager", "compile", "onnx", "openvino"]
ExportDtype = Literal["float32", "float16", "bfloat16"]
REQUIRED: Any = MISSING
"""Marks an option without a default, which the user must set."""
IN_MEMORY = ""
"""Value of the option ``checkpoint`` if the model is a module in memory."""
NEEDS_IMAGES = {"data_dir": GIVEN, "dataset": GIVEN}
HIGHEST_RATE = 1e36
"""Largest allowed learning rate. Larger values overflow float32 in Adam's first step."""


def seed_option() -> int:
    return option(42, panel="Computing", at_least=-(2**63), at_most=2**64 - 1)


@dataclass(frozen=True, kw_only=True)
class ArchitectureOptions(Options, panel="Model"):
    model: str | None = None
    """timm architecture, such as vit_tiny_patch16_224. Required if the checkpoint does not name its
    architecture."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for building the timm architecture, such as img_size=32 or depth=6."""
    part: str | None = None
    """Entry of a training checkpoint that holds the model's weights, such as state_dict, student or
    backbone."""


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(ArchitectureOptions, panel="Arguments"):
    num_classes: int | None = option(None, panel="Model", at_least=0)
    """Expected number of classes. A checkpoint with another number is an error. 0 drops the classifier."""
    checkpoint: PathLike = option(REQUIRED, metavar="CHECKPOINT", reads="checkpoint")
    """Model, unpruned (dense) or pruned by mhacut (slim): a .safetensors or .pth file, a timm folder,
    timm:NAME or hf-hub:OWNER/NAME."""


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options, panel="Computing"):
    device: str = "auto"
    """Device that runs the model: auto (a GPU if there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if self.device is not None:  # a torch.device becomes its name; torch is not imported here
            object.__setattr__(self, "device", str(self.device))
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class ImageSource(Options, panel="Data"):
    data_dir: PathLike | None = option(None, metavar="DIR", reads="data_dir")
    """Image folder in one of 3 layouts: folders train/ and val/, 1 folder per class, or unlabelled images."""
    dataset: str | None = None
    """Dataset in timm's notation: hfds/NAME (Hugging Face), wds/NAME (WebDataset), tfds/NAME (TensorFlow) or
    torch/NAME (torchvision)."""

    @property
    def has_images(self) -> bool:
        return self.data_dir is not None or self.dataset is not None


@dataclass(frozen=True, kw_only=True)
class LabelledImages(ImageSource, panel="Data", needs=NEEDS_IMAGES):
    class_map: PathLike | None = option(None, metavar="FILE", reads="class_map")
    """Text file with 1 class name per line, in the order of the classifier's outputs."""
    val_split: str = "val"
    """Folder or dataset split with the validation images."""
    workers: int | None = option(None, at_least=0, at_most=MAX_PARALLEL)
    """Number of processes that load images. Default: 2, or 1 on a machine with 1 CPU."""


@dataclass(frozen=True, kw_only=True)
class DataOptions(LabelledImages, panel="Data", needs=NEEDS_IMAGES):
    train_split: str = "train"
    """Folder or dataset split with the calibration or training images."""


@dataclass(frozen=True, kw_only=True)
class PreprocessingOptions(Options, panel="Preprocessing"):
    """Image preprocessing. The value None means the checkpoint's own preprocessing."""

    mean: tuple[float, ...] | None = None
    """Mean per colour channel for normalising images with pixel values in 0..1. Default: set by the
    checkpoint."""
    std: tuple[float, ...] | None = None
    """Standard deviation per colour channel for normalising images with pixel values in 0..1. Default: set by
    the checkpoint."""
    crop_pct: float | None = None
    """Side of the centre crop, as a fraction of the resized image's shorter side. Default: set by the
    checkpoint."""
    interpolation: str | None = None
    """Interpolation for resizing images, such as bicubic or bilinear. Default: set by the checkpoint."""
    img_size: int | None = None
    """Height and width of the model's input images in pixels. Default: set by the checkpoint."""

    @property
    def given(self) -> frozenset[str]:
        """Names of the preprocessing options that are set."""
        return frozenset(self.only(PreprocessingOptions).changed())


@dataclass(frozen=True, kw_only=True)
class TimingOptions(Options, panel="Measuring", needs={"latency": True, "max_latency": GIVEN}):
    """Conditions of the latency measurements of ``mhacut prune``."""

    latency: bool = option(True, needs={}, off="Measure no latency.")
    """Measure the latency of the dense and the pruned model."""
    latency_batch_size: int = option(8, at_least=1)
    """Batch size for latency measurements."""
    runtime: Runtime = "eager"
    """Runtime for latency measurements: PyTorch (eager), torch.compile, ONNX Runtime or OpenVINO. ONNX
    Runtime and OpenVINO run on the CPU."""
    int8: bool = False
    """Measure latency in INT8, with dynamic quantization in ONNX Runtime."""
    threads: int | None = option(None, at_least=1, at_most=MAX_PARALLEL)
    """Number of CPU threads for latency measurements. Default: PyTorch's default."""

    @property
    def on_cpu(self) -> bool:
        return self.runtime in ("onnx", "openvino")
