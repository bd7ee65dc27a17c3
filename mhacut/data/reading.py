"""Read images by index, and report unreadable images. timm would replace them by the next image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import EpsImagePlugin, Image
from torch import Tensor
from torch.utils.data import Dataset

from mhacut.data.preprocessing import Preprocessing, Transform
from mhacut.errors import DataError, option_name

# Security: EPS files are programs, which Pillow would run with Ghostscript. Excluding the format in
# Image.open is not enough: IPTC files can hold EPS, and timm and torchvision open images themselves.
EpsImagePlugin.gs_binary = EpsImagePlugin.gs_windows_binary = False
_SIXTEEN_BITS = ("PNG", "PPM")
"""File formats in which Pillow's mode I means unsigned 16 bits."""


def open_image(source: Any, channels: int) -> Image.Image:
    mode = "RGB" if channels == 3 else "L"
    if isinstance(source, Image.Image):
        return source.convert(mode)
    with Image.open(source) as opened:
        opened.load()
        picture: Image.Image = opened
        if picture.mode == "F" or (picture.mode == "I" and opened.format not in _SIXTEEN_BITS):
            raise ValueError("pixels are floats or 32-bit integers, whose value range is unknown")
        if picture.mode.startswith("I"):
            # 16 bits: Pillow's own conversion would clip everything above 255 to white
            picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).astype(np.uint8))
        elif picture.mode == "P" and "transparency" in picture.info:
            picture = picture.convert("RGBA")
        return picture.convert(mode)


@dataclass(frozen=True)
class Unreadable:
    """Placeholder for an image that could not be read, with the reason."""

    file: str
    reason: str


Sample = tuple["Tensor | Unreadable", int]


class ImagesByIndex(Dataset[Sample]):
    """Dataset of (transformed image, label). ``items`` is a list of (file or PIL image, label)."""

    def __init__(
        self, items: Any, preprocessing: Preprocessing, transform: Transform | None = None, name: str = ""
    ) -> None:
        self.items, self.name = items, name
        self._channels = preprocessing.input_size[0]
        self.transform = transform or preprocessing.transform()

    def __getitem__(self, index: int) -> Sample:
        source: Any = None
        try:
            source, label = self.items[index]
            picture = open_image(source, self._channels)
        except Exception as error:
            file = source if isinstance(source, str) else f"{self.name}[{index}]"
            reason = str(error).replace(f" {file!r}", "") or type(error).__name__
            if "Ghostscript" in reason:
                reason = "is PostScript, which mhacut does not run"
            return Unreadable(file, reason), -1
        return self.transform(picture), -1 if label is None else int(label)


def collate(samples: Sequence[Sample]) -> tuple[Tensor, Tensor, list[Unreadable]]:
    """Stack the readable images [n, C, H, W] and their labels [n]. Return the unreadable images as a list."""
    bad = [image for image, _ in samples if isinstance(image, Unreadable)]
    good = [(image, label) for image, label in samples if not isinstance(image, Unreadable)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return images, torch.tensor([label for _, label in good], dtype=torch.int64), bad


def label_outside(labels: Tensor, num_classes: int | None) -> int | None:
    """Return a label that is not a class index of the model; None if all labels are valid."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        return low
    return high if num_classes is not None and high >= num_classes else None


def check_labels(labels: Tensor, num_classes: int | None, where: str) -> None:
    wrong = label_outside(labels, num_classes)
    if wrong is not None:
        raise DataError(
            f"{where}: found label {wrong}, the model's head has {num_classes} classes, counted from 0. "
            f"Map the classes with {option_name('class_map')}"
        )


def balanced_order(groups: Sequence[object], seed: int) -> Iterator[int]:
    """Yield all indices in random order, taking 1 index from each group in turn.

    >>> order = list(balanced_order(["a"] * 6 + ["b"] * 2, seed=0))
    >>> sorted(order), sum(index >= 6 for index in order[:4])
    ([0, 1, 2, 3, 4, 5, 6, 7], 2)
    """
    generator = torch.Generator().manual_seed(seed)
    members: dict[object, list[int]] = {}
    for index in torch.randperm(len(groups), generator=generator).tolist():
        members.setdefault(groups[index], []).append(index)
    # Each turn takes one image of each remaining class, so rare classes come early.
    for turn in range(max(map(len, members.values()), default=0)):
        left = [indices[turn] for indices in members.values() if turn < len(indices)]
        for position in torch.randperm(len(left), generator=generator).tolist():
            yield left[position]
