"""Read another library's configuration, one checked value at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mhacut.errors import CheckpointError
from mhacut.limits import MAX_CROP_PCT, is_int, is_number

_Value = TypeVar("_Value")


class Config:
    """An untrusted JSON object. Methods raise :class:`CheckpointError` for wrong types and ranges."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def fault(self, name: str, expected: str) -> CheckpointError:
        value = self._values.get(name)
        shown = "dict" if isinstance(value, dict) else f"{value!r:.80}"
        return CheckpointError(f"{self.where}: {name}: expected {expected}, found {shown}")

    def get(self, name: str, default: _Value) -> _Value:
        """Return the value of ``name``, or ``default`` if missing. The type must be that of ``default``.

        Integers must be at least 1, or at least 0 if ``default`` is 0. A list of 2 equal integers counts as
        one integer, as in image and patch sizes.
        """
        value: Any = self._values.get(name)
        if value is None:
            return default
        if type(default) is int and isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        expected, fits = _expectation(value, default)
        if not fits:
            raise self.fault(name, expected)
        converted: Any = float(value) if isinstance(default, float) else value
        return cast(_Value, converted)

    def read(self, table: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
        """Return timm's arguments. ``table`` is {timm's argument: (key in this JSON object, default)}."""
        return {argument: self.get(name, default) for argument, (name, default) in table.items()}

    def numbers(self, name: str, count: int) -> list[float]:
        value = self._values.get(name)
        if not isinstance(value, list) or len(value) != count or not all(map(is_number, value)):
            raise self.fault(name, f"a list of {count} numbers")
        return [float(item) for item in value]

    def part(self, name: str) -> Config:
        value = self._values.get(name)
        if not isinstance(value, dict):
            raise self.fault(name, "an object")
        return Config(value, f"{self.where}: {name}")

    def raw(self, name: str) -> Any:
        return self._values.get(name)

    def require(self, fixed: Mapping[str, Any], reason: str) -> None:
        for name, expected in fixed.items():
            value = expected if name not in self else self._values[name]
            if value != expected or isinstance(value, bool) != isinstance(expected, bool):
                raise CheckpointError(
                    f"{self.where}: {name} {value!r:.80} cannot be converted: {reason}; expected {expected!r}"
                )

    def require_eps(self, timms: float, default: float) -> None:
        stated = self.get("layer_norm_eps", default)
        # Epsilons below 1e-6 are accepted: with 1e-6 for 1e-12, logits agree within 1e-5.
        if abs(stated - timms) > 1.5e-6:
            raise CheckpointError(
                f"{self.where}: layer_norm_eps {stated:g} cannot be converted: timm's model uses {timms:g}"
            )


def _expectation(value: Any, default: Any) -> tuple[str, bool]:
    least = 0 if default == 0 else 1
    if isinstance(default, bool):
        return "true or false", isinstance(value, bool)
    if isinstance(default, str):
        return "a text", isinstance(value, str)
    if isinstance(default, float):
        return "a number that is not negative", is_number(value) and value >= 0
    if isinstance(default, list):
        return "a list of whole numbers", isinstance(value, list) and all(map(is_int, value))
    return f"a whole number from {least}, or two equal ones", is_int(value) and value >= least


IMAGENET_CFG: dict[str, Any] = {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)}
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_MAX_LABEL = 200
_SHORTEST_EDGE = ("CLIP", "ConvNext", "Pvt")
"""Prefixes of image processor classes that resize the shorter edge if ``size`` is one number."""


def transformers_cfg(processor: Config, channels: int) -> dict[str, Any]:
    scale = 255.0  # pixel range of mean and std; mhacut's is 0..1
    rescales = processor.get("do_rescale", True)
    if rescales:
        scale *= processor.get("rescale_factor", 1 / 255) or 1 / 255
    mean, std = [0.0] * channels, [1.0] * channels
    if processor.get("do_normalize", "image_mean" in processor):
        mean, std = processor.numbers("image_mean", channels), processor.numbers("image_std", channels)
        # Without do_rescale, some folders have statistics for 0..255, others expect pixels in 0..1.
        if not rescales and max(*mean, *std) <= 1 and (any(mean) or set(std) != {1.0}):
            scale = 1.0
    cfg: dict[str, Any] = {
        "mean": [value / scale for value in mean],
        "std": [value / scale for value in std],
    }
    resample = processor.raw("resample")
    if isinstance(resample, int) and resample in _RESAMPLE:
        cfg["interpolation"] = _RESAMPLE[resample]
    return {**cfg, **_crop(processor)}


def image_side(processor: Config) -> int | None:
    crops = processor.get("do_center_crop", "crop_size" in processor)
    return _side(processor, "crop_size") if crops else _side(processor, "size")


def _crop(processor: Config) -> dict[str, Any]:
    crop, resized = image_side(processor), _side(processor, "size")
    if crop is None or resized is None:
        return {}
    size = processor.raw("size")
    kind = _kind(processor)
    keeps_ratio = "shortest_edge" in size if isinstance(size, dict) else kind.startswith(_SHORTEST_EDGE)
    share = crop / resized
    if keeps_ratio and crop == resized and "crop_pct" in processor and resized < 384:
        share = processor.get("crop_pct", 1.0)
    # timm cannot express enlarging without a crop.
    if not 0 < share <= MAX_CROP_PCT:
        return {}
    return {"crop_pct": share, "crop_mode": "center" if keeps_ratio else "squash"}


def _kind(processor: Config) -> str:
    return str(processor.raw("image_processor_type") or processor.raw("feature_extractor_type") or "")


def _side(processor: Config, name: str) -> int | None:
    value = processor.raw(name)
    if not isinstance(value, dict):
        return processor.get(name, 224) if value is not None else None
    inner = processor.part(name)
    if "shortest_edge" in inner:
        return inner.get("shortest_edge", 224)
    height = inner.get("height", 1)
    return height if "height" in inner and height == inner.get("width", 1) else None


def label_names(config: Config, classes: int) -> list[str] | None:
    labels = config.raw("id2label")
    if not isinstance(labels, dict) or len(labels) != classes:
        return None
    names = [labels.get(str(index)) for index in range(classes)]
    if not all(isinstance(name, str) and len(name) <= _MAX_LABEL for name in names):
        return None
    # transformers generates these names.
    if all(name == f"LABEL_{index}" for index, name in enumerate(names)):
        return None
    return [str(name) for name in names]
