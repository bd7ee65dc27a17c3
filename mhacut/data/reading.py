"""Images by index. Unreadable images are reported; timm would replace them by the next image."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import EpsImagePlugin, Image
from torch import Tensor
from torch.utils.data import Dataset

from mhacut.data.preprocessing import Preprocessing, Transform

# Security: EPS files are programs, which Pillow would run with Ghostscript. Excluding the format in
# Image.open is not enough: IPTC files can hold EPS, and timm and torchvision open images themselves.
EpsImagePlugin.gs_binary = EpsImagePlugin.gs_windows_binary = False
_SIXTEEN_BITS = ("PNG", "PPM")
"""Formats whose mode I means unsigned 16 bits."""


def open_image(file: Any, channels: int) -> Image.Image:
    """Return the decoded picture as RGB or grey."""
    with Image.open(file) as opened:
        opened.load()
        picture: Image.Image = opened
        if picture.mode == "F" or (picture.mode == "I" and opened.format not in _SIXTEEN_BITS):
            raise ValueError("pixels are floats or 32-bit integers of unknown range")
        if picture.mode.startswith("I"):
            # 16 bits: Pillow's own conversion would clip everything above 255 to white
            picture = Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).astype(np.uint8))
        elif picture.mode == "P" and "transparency" in picture.info:
            picture = picture.convert("RGBA")
        return with_channels(picture, channels)


def with_channels(picture: Image.Image, channels: int) -> Image.Image:
    return picture.convert("RGB" if channels == 3 else "L")


@dataclass(frozen=True)
class Unreadable:
    """Placeholder for an image that could not be read."""

    file: str
    reason: str


Sample = tuple["Tensor | Unreadable", int]


class ImageFiles(Dataset[Sample]):
    def __init__(
        self,
        root: Path,
        images: Sequence[str],
        labels: Sequence[int],
        preprocessing: Preprocessing,
        transform: Transform | None = None,
    ) -> None:
        self.root, self.images, self.labels = root, images, labels
        self._channels = preprocessing.input_size[0]
        self.transform = transform or preprocessing.transform()

    def __getitem__(self, index: int) -> Sample:
        path = self.root / self.images[index]
        try:
            picture = open_image(path, self._channels)
        except Exception as error:
            return Unreadable(str(path), reason_of(error, path)), self.labels[index]
        return self.transform(picture), self.labels[index]


def reason_of(error: BaseException, path: object = "") -> str:
    """Return Pillow's message without the path."""
    if "Ghostscript" in str(error):
        return "is PostScript, which mhacut does not run"
    return str(error).replace(f" {str(path)!r}", "") or type(error).__name__


def collate(samples: Sequence[Sample]) -> tuple[Tensor, Tensor, list[Unreadable]]:
    """Stack the readable images [n, C, H, W] and labels [n]; list the unreadable ones."""
    bad = [image for image, _ in samples if isinstance(image, Unreadable)]
    good = [(image, label) for image, label in samples if not isinstance(image, Unreadable)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return images, torch.tensor([label for _, label in good], dtype=torch.int64), bad


def label_outside(labels: Tensor, num_classes: int | None) -> int | None:
    """Return a label outside the model's classes; None if all are valid. -1 means missing."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        return low
    return high if num_classes is not None and high >= num_classes else None


def balanced_order(groups: Sequence[object], seed: int) -> Iterator[int]:
    """Yield all indices in random order, one per group in turn.

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


def fingerprint(names: Sequence[str], labels: Sequence[object]) -> str:
    """Return a digest of names and labels, independent of the folder."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    for label in labels:
        digest.update(f"{label},".encode())
    return digest.hexdigest()
