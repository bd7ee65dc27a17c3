"""Preprocessing: from an image file to the model's input."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from mhacut.errors import DataError, UsageError, option_name
from mhacut.limits import MAX_CROP_PCT, MIN_CROP_PCT, too_large
from mhacut.options.base import PreprocessingOptions

SMALL_IMAGE = 64
"""Largest image side in pixels at which images are not cropped by default."""
Transform = Callable[[Image.Image], Tensor]
"""Function from a PIL image to a normalised float32 tensor [C, H, W]."""
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Preprocessing:
    """Size, normalisation, resizing and cropping of a model's input."""

    input_size: tuple[int, int, int]
    """Image size (channels, height, width)."""
    mean: tuple[float, ...]
    """Mean per channel, for pixel values from 0 to 1."""
    std: tuple[float, ...]
    """Standard deviation per channel, for pixel values from 0 to 1."""
    interpolation: str
    """Interpolation for resizing, for example ``bicubic`` or ``bilinear``."""
    crop_pct: float
    """Image side after the crop divided by the side before the crop. Above 1.0, a border is added."""
    crop_mode: str
    """timm's crop mode: ``center``, ``squash`` or ``border``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_size", tuple(int(size) for size in self.input_size))
        if len(self.input_size) != 3 or min(self.input_size) < 1:
            raise DataError(f"input size {self.input_size}: expected (channels, height, width)")
        fault = too_large(self.input_size)
        if fault:
            raise DataError(f"input size {self.input_size}: {fault}")
        channels = self.input_size[0]
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            values = values * channels if len(values) == 1 else values
            usable = all(map(math.isfinite, values)) and (name == "mean" or min(values, default=0) > 0)
            if len(values) != channels or not usable:
                above = " above 0" if name == "std" else ""
                raise DataError(
                    f"{name} {getattr(self, name)}: expected {channels} number(s){above}, for pixels in 0..1"
                )
            object.__setattr__(self, name, values)
        object.__setattr__(self, "crop_pct", float(self.crop_pct))
        if not MIN_CROP_PCT <= self.crop_pct <= MAX_CROP_PCT:
            raise DataError(
                f"crop_pct {self.crop_pct}: expected at least {MIN_CROP_PCT}, at most {MAX_CROP_PCT}"
            )
        if self.interpolation not in _INTERPOLATIONS:
            raise DataError(
                f"interpolation {self.interpolation!r}: expected one of {', '.join(_INTERPOLATIONS)}"
            )
        if self.crop_mode not in _CROP_MODES:
            raise DataError(f"crop_mode {self.crop_mode!r}: expected one of {', '.join(_CROP_MODES)}")

    @classmethod
    def resolve(
        cls,
        pretrained_cfg: Mapping[str, Any],
        model_input_size: tuple[int, int, int] | None,
        overrides: PreprocessingOptions | None = None,
    ) -> Preprocessing:
        """Return the preprocessing of timm's ``pretrained_cfg``, adapted to the model.

        ``model_input_size`` [C, H, W] replaces the size in the cfg. ``overrides`` replaces any value.
        Images of up to 64 pixels are not cropped, unless ``pretrained_cfg`` has a crop for their size.
        If the model does not take 3 channels, mean and std are averaged over the channels.

        >>> made_for_224 = {"input_size": (3, 224, 224), "crop_pct": 0.9}
        >>> Preprocessing.resolve(made_for_224, (3, 224, 224)).crop_pct
        0.9
        >>> Preprocessing.resolve(made_for_224, (3, 32, 32)).crop_pct
        1.0
        """
        overrides = overrides or PreprocessingOptions()
        explicit = {
            name: getattr(overrides, name)
            for name in ("mean", "std", "crop_pct", "interpolation")
            if getattr(overrides, name) is not None
        }
        size = tuple(model_input_size or pretrained_cfg.get("input_size") or (3, 224, 224))
        if len(size) != 3:
            raise DataError(f"input size {size}: expected (channels, height, width)")
        if overrides.img_size is not None:
            size = (size[0], overrides.img_size, overrides.img_size)
        # Explicit values are added afterwards: timm would assert on a wrong number of channels.
        config = resolve_data_config({"input_size": size}, pretrained_cfg=dict(pretrained_cfg)) | explicit
        # A crop of 0.875 would cut four pixels off each side of a CIFAR image, which fills its frame.
        if "crop_pct" not in explicit and is_too_small_to_crop(pretrained_cfg, size):
            config["crop_pct"] = 1.0
        try:
            for name in ("mean", "std"):
                # RGB statistics are averaged for other channels.
                if name not in explicit and len(config[name]) == 3 != size[0]:
                    config[name] = (sum(config[name]) / 3,)
            return cls(**{name: config[name] for name in cls.__dataclass_fields__})
        except (TypeError, ValueError) as error:  # the record may come from an untrusted file
            raise DataError(f"preprocessing: {error}") from None
        except DataError as error:
            given = sorted(overrides.given)
            if given:
                raise UsageError(f"{error} ({', '.join(map(option_name, given))})") from None
            raise

    def to_json(self) -> dict[str, Any]:
        lists = {name: list(getattr(self, name)) for name in ("input_size", "mean", "std")}
        return {**vars(self), **lists}

    def check_channels(self, hint: str = "") -> None:
        if self.input_size[0] not in (1, 3):
            raise DataError(
                f"the model takes images of {self.input_size[0]} channels, and image files have 1 or 3{hint}"
            )

    def transform(self) -> Transform:
        self.check_channels()
        made: Transform = create_transform(
            input_size=self.input_size,
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        return made


def is_too_small_to_crop(pretrained_cfg: Mapping[str, Any], size: Sequence[int]) -> bool:
    stated = pretrained_cfg.get("input_size")
    of_this_size = stated is None or tuple(stated)[1:] == tuple(size[1:])
    return max(size[1:]) <= SMALL_IMAGE and (pretrained_cfg.get("crop_pct") is None or not of_this_size)
