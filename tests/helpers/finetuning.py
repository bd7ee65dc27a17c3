"""What tests of fine-tuning share besides fixtures."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import nn

import mhacut
from mhacut.finetuning.images import Batch
from mhacut.finetuning.objective import Mixing, Objective
from mhacut.finetuning.training import Trainer
from mhacut.options.finetune import FinetuneOptions
from mhacut.runtime.distributed import Processes

CLASSES = 7


class Killed(BaseException):
    """Stands for the end of the process: nobody catches it."""


def killed():
    raise Killed


def resume(folder, **options):
    return mhacut.finetune(resume=folder, **options)


def weights(folder, name="last.safetensors"):
    return load_file(folder / name)


def small_trainer(**options) -> Trainer:
    torch.manual_seed(0)
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), pooled, nn.Linear(4, 3))
    given = FinetuneOptions.of(**{"checkpoint": "a", "lr": 1e-4, **options})
    return Trainer(
        model,
        Objective(given, 3),
        Mixing(given, 3),
        given,
        Processes(0, 1, torch.device("cpu")),
        labelled=True,
        total_steps=8,
        steps_per_epoch=4,
    )


def take_steps(trainer: Trainer, first: int, last: int) -> None:
    for number in range(first, last):
        images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(number))
        trainer.step(number, [Batch(images, torch.tensor([0, 1, 2, 0]), ())])
