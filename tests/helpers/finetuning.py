"""What tests of fine-tuning share besides fixtures."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import mhacut
from mhacut.finetuning.folder import RunFolder
from mhacut.finetuning.images import Batch
from mhacut.finetuning.objective import Mixing, Objective
from mhacut.finetuning.progress import Progress
from mhacut.finetuning.result import EpochSummary
from mhacut.finetuning.saved_state import read_saved, unfit
from mhacut.finetuning.training import Trainer
from mhacut.measuring.accuracy import Evaluation
from mhacut.options.finetune import FinetuneOptions
from mhacut.runtime.distributed import Processes

CLASSES = 7


class Killed(BaseException):
    """Stands for the end of the process: nobody catches it."""


def picture(generator, label):
    """Noise over a tint that tells the class."""
    pixels = generator.integers(0, 120, (32, 32, 3)) + 18 * np.array([label, 6 - label, 3])
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def resume(folder, **options):
    return mhacut.finetune(resume=folder, **options)


def weights(folder, name="last.safetensors"):
    return load_file(folder / name)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


INPUTS = {"slim file": "0" * 64, "validation images": "1" * 64, "images per step": 4}


def small_trainer(**options) -> Trainer:
    """A trainer of a small classifier, for eight steps of four images, four of them to an epoch."""
    torch.manual_seed(0)
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), pooled, nn.Linear(4, 3))
    given = FinetuneOptions.from_flat(checkpoint="a", warmup_epochs=0, **options)
    objective = Objective(
        teacher=None,
        student=None,
        label_weight=1.0,
        temperature=1.0,
        feature_weight=0.0,
        smoothing=0.0,
        classes=3,
    )
    return Trainer(
        model,
        objective,
        Mixing(given.augmentation, 3),
        given,
        Processes(0, 1, torch.device("cpu")),
        labelled=True,
        total_steps=8,
        steps_per_epoch=4,
    )


def take_steps(trainer: Trainer, first: int, last: int) -> None:
    """Train from one step to before another."""
    for number in range(first, last):
        images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(number))
        trainer.step(number, [Batch(images, torch.tensor([0, 1, 2, 0]), ())])


def small_state(trainer: Trainer) -> dict[str, Any]:
    """What a run with this trainer saves after step 4."""
    progress = Progress(
        step=4,
        best=50.0,
        before=Evaluation(40.0, None, 6, 0.1, 1.5),
        rows=[EpochSummary(0, 1.2, 1.5, 50.0, None, 1e-3)],
        unreadable={"a.png": None},
    )
    return {"began_with": dict(INPUTS), "trainer": trainer.state(), **progress.to_state()}


def go_on(folder: Path, trainer: Trainer, last: int = 5) -> Progress | None:
    """Go on with the run that was saved in ``folder``, as ``finetune --resume`` does."""
    saved = read_saved(RunFolder(folder), trainer, INPUTS, (8, 4))
    if saved is None:
        return None
    trainer.restore_optimizer(saved[1], partial(unfit, RunFolder(folder)))
    trainer.restore_weights(saved[1])
    take_steps(trainer, saved[0].step, last)
    return saved[0]
