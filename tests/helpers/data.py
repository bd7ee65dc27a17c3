"""Small images, and how to read them by the names of the options, all on one level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mhacut.data import (
    CalibrationImages,
    EvaluationLoader,
    Preprocessing,
    calibration_images,
    evaluation_loader,
)
from mhacut.options.base import DataOptions

PLAIN = Preprocessing((3, 16, 16), (0.0,), (1.0,), "bicubic", 1.0, "center")
CLASSES = ("ant", "bee", "cat")


def write_image(path: Path, level: int = 128) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (level, level, level)).save(path)
    return path


def write_split(folder: Path, classes=CLASSES, per_class: int = 4) -> Path:
    """Image k of class c has grey level 20 c + k."""
    for number, name in enumerate(classes):
        for k in range(per_class):
            write_image(folder / name / f"{k}.png", 20 * number + k)
    return folder


def calibrated(preprocessing: Preprocessing, **options: Any) -> CalibrationImages:
    """Calibration images of ``data_dir``, ``dataset``, ...; other options are the function's own."""
    return calibration_images(preprocessing, _source(options), **options)


def evaluated(preprocessing: Preprocessing, **options: Any) -> EvaluationLoader:
    return evaluation_loader(preprocessing, _source(options), **options)


def levels(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


def evaluation(root: Path, **changes):
    options = {"batch_size": 5, "workers": 0, "num_classes": 3} | changes
    return evaluated(PLAIN, data_dir=root, **options)


def _source(options: dict[str, Any]) -> DataOptions:
    names = DataOptions.__dataclass_fields__.keys() & options.keys()
    return DataOptions(**{name: options.pop(name) for name in names})
