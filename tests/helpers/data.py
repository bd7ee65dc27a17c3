"""Images by the names of the options, all on one level."""

from __future__ import annotations

from typing import Any

from mhacut.data import (
    CalibrationImages,
    EvaluationLoader,
    Preprocessing,
    calibration_images,
    evaluation_loader,
)
from mhacut.options.base import DataOptions


def calibrated(preprocessing: Preprocessing, **options: Any) -> CalibrationImages:
    """Calibration images of ``data_dir``, ``dataset``, ...; other options are the function's own."""
    return calibration_images(preprocessing, _source(options), **options)


def evaluated(preprocessing: Preprocessing, **options: Any) -> EvaluationLoader:
    """Evaluation images, likewise."""
    return evaluation_loader(preprocessing, _source(options), **options)


def _source(options: dict[str, Any]) -> DataOptions:
    names = DataOptions.__dataclass_fields__.keys() & options.keys()
    return DataOptions(**{name: options.pop(name) for name in names})
