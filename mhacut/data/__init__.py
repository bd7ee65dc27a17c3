"""Images for calibration and evaluation: folders, timm's named datasets, in memory, or synthetic ones."""

from mhacut.data.folders import IMAGE_SUFFIXES, SPLIT_NAMES, has_split
from mhacut.data.in_memory import ImagesInMemory
from mhacut.data.preprocessing import Preprocessing
from mhacut.data.sets import (
    CalibrationImages,
    EvaluationLoader,
    WithoutLabels,
    calibration_images,
    evaluation_loader,
)
from mhacut.data.synthetic import synthetic_images

__all__ = [
    "IMAGE_SUFFIXES",
    "SPLIT_NAMES",
    "CalibrationImages",
    "EvaluationLoader",
    "ImagesInMemory",
    "Preprocessing",
    "WithoutLabels",
    "calibration_images",
    "evaluation_loader",
    "has_split",
    "synthetic_images",
]
