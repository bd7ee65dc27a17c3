"""What tests of fine-tuning share besides fixtures."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import mhacut

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
