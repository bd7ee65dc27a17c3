"""What the cells of a comparison have in common, and how it is read.

This module imports the standard library only; what its functions need they import themselves.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mhacut.checkpoint.checkpoint import Checkpoint
    from mhacut.data import CalibrationImages, Preprocessing

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Setup:
    """What all cells have in common."""

    checkpoint: str
    model: str | None
    model_args: tuple[str, ...]
    """``key=value``, as the command line of mhacut takes them."""
    data_dir: str
    mean: str | None
    """``A,B,C``"""
    std: str | None
    """``A,B,C``"""
    calibration_images: int
    seed: int
    class_map: str | None = None

    @classmethod
    def of(cls, asked: argparse.Namespace, *, calibration_images: int, seed: int) -> Setup:
        """Take what the flags of ``subjects.add_flags`` say."""
        exists = os.path.exists(asked.checkpoint)  # else a name of timm's
        return cls(
            checkpoint=os.path.abspath(asked.checkpoint) if exists else asked.checkpoint,
            model=asked.model,
            model_args=tuple(asked.model_arg),
            data_dir=os.path.abspath(asked.data_dir),
            mean=asked.mean,
            std=asked.std,
            calibration_images=calibration_images,
            seed=seed,
            class_map=asked.class_map,
        )

    def flags(self) -> list[str]:
        """Flags of ``mhacut prune`` that say the same, all but the checkpoint and the data."""
        flags = ["--seed", str(self.seed), "--calibration-images", str(self.calibration_images)]
        if self.model is not None:
            flags += ["--model", self.model]
        for argument in self.model_args:
            flags += ["--model-arg", argument]
        for name, value in (("--mean", self.mean), ("--std", self.std), ("--class-map", self.class_map)):
            flags += [] if value is None else [name, value]
        return flags

    def arguments(self) -> dict[str, Any]:
        """``model_args`` as keyword arguments take them."""
        import yaml

        pairs = (argument.partition("=") for argument in self.model_args)
        return {name: yaml.safe_load(value) for name, _, value in pairs}

    def told(self) -> dict[str, Any]:
        """For the table's file: names instead of paths, and a digest that tells checkpoints apart."""
        told = asdict(self) | {"model_args": list(self.model_args)}
        class_map = told.pop("class_map")
        told |= {} if class_map is None else {"class_map": Path(class_map).name}
        told |= {"checkpoint": Path(self.checkpoint).name, "data_dir": Path(self.data_dir).name}
        return told | {"checkpoint_sha256": digest(self.checkpoint)}


def setup_of(job: Mapping[str, Any]) -> Setup:
    return Setup(**{**job["setup"], "model_args": tuple(job["setup"]["model_args"])})


def digest(checkpoint: str) -> str:
    """sha256 of a file, or of a folder's files; empty for what is neither."""
    path = Path(checkpoint)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest() if files else ""


def read(setup: Setup) -> tuple[Checkpoint, Preprocessing]:
    """Model and preprocessing, as ``mhacut prune`` reads them."""
    from mhacut.checkpoint.load import read_model
    from mhacut.checkpoint.preprocessing import resolve_preprocessing
    from mhacut.options.base import PreprocessingOptions

    loaded = read_model(setup.checkpoint, model=setup.model, model_args=setup.arguments())
    mean, std = (
        None if text is None else tuple(float(part) for part in text.split(","))
        for text in (setup.mean, setup.std)
    )
    return loaded, resolve_preprocessing(loaded, PreprocessingOptions(mean=mean, std=std))


def read_all(setup: Setup) -> tuple[Checkpoint, Preprocessing, CalibrationImages]:
    """The same and the labelled calibration images."""
    from mhacut.data import calibration_images
    from mhacut.options.base import DataOptions

    loaded, preprocessing = read(setup)
    seen = calibration_images(
        preprocessing,
        DataOptions(data_dir=setup.data_dir, class_map=setup.class_map),
        count=setup.calibration_images,
        seed=setup.seed,
        num_classes=loaded.model.num_classes,
    )
    return loaded, preprocessing, seen


def evaluation_images(setup: Setup, preprocessing: Preprocessing, num_classes: int) -> Any:
    """Batches of images and labels of val/."""
    from mhacut.data import evaluation_loader
    from mhacut.options.base import LabelledImages

    return evaluation_loader(
        preprocessing,
        LabelledImages(data_dir=setup.data_dir, class_map=setup.class_map, workers=0),
        num_classes=num_classes,
        batch_size=EVALUATION_BATCH,
    )
