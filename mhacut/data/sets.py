"""Images of a command: calibration images, and labelled images for accuracy."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from mhacut.data.folders import IMAGE_SUFFIXES, find_folder, label_images, scan, subfolders
from mhacut.data.named import NamedStream, open_named, targets_of
from mhacut.data.preprocessing import Preprocessing, Transform
from mhacut.data.reading import (
    ImagesByIndex,
    Sample,
    Unreadable,
    balanced_order,
    check_labels,
    collate,
)
from mhacut.data.synthetic import synthetic_images
from mhacut.errors import DataError, UsageError, option_name
from mhacut.options.base import DataOptions, LabelledImages
from mhacut.runtime.process import worker_count
from mhacut.text import listed


@dataclass(frozen=True)
class Split:
    """Images of a split of a folder or named dataset. The images are listed, not opened."""

    name: str
    """Text for messages, for example ``under val/`` or ``of torch/cifar10 val``."""
    images: Dataset[Sample] | None
    """Dataset of (image, label) by index; None for a dataset that can only be read in order."""
    groups: Sequence[object]
    """Class of each image, for balanced sampling. If classes are unknown, all entries are equal."""
    labelled: bool
    """Whether the images have labels that are used."""
    stream: Any = None
    """timm dataset that can only be read in order; None if ``images`` is set."""

    @property
    def label_note(self) -> str:
        return "with labels" if self.labelled else "without labels"


def open_split(
    data: LabelledImages,
    option: Literal["train_split", "val_split"],
    preprocessing: Preprocessing,
    *,
    num_classes: int | None,
    use_labels: bool = True,
    seed: int | None = None,
    transform: Transform | None = None,
) -> Split:
    split = getattr(data, option)
    if data.dataset is not None:
        name, where = str(data.dataset), f"of {data.dataset} {split}"
        opened = open_named(data, split, num_classes, seed=seed, check_classes=use_labels)
        if isinstance(opened, IterableDataset):
            return Split(where, None, (), use_labels, opened)
        if not len(opened):
            raise DataError(
                f"{option_name('dataset', name)}, split {split!r}: found no images. Choose another split"
            )
        # timm's reader, because timm's dataset replaces an unreadable image by the next one.
        images = ImagesByIndex(getattr(opened, "reader", opened), preprocessing, transform, name)
        return Split(where, images, targets_of(name, opened), use_labels)
    assert data.data_dir is not None
    folder = scan(find_folder(data.data_dir, split, option))
    if not folder.images:
        raise DataError(
            f"{folder.path}: no images found; folders there: {listed(folder.classes)}. Image files end in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    labels = [-1] * len(folder.images)
    labelled = use_labels and any(folder.names)
    if labelled:
        hint = f", or leave labels out with {option_name('labels', False)}" if option == "train_split" else ""
        # Commands that read both splits compare their class folders once, for the training split.
        reads_both = isinstance(data, DataOptions)
        other = data.val_split if option == "train_split" else None if reads_both else "train"
        labels = label_images(folder, data, num_classes, hint, other=other)
    files = [os.path.join(folder.path, image) for image in folder.images]
    images = ImagesByIndex(list(zip(files, labels, strict=True)), preprocessing, transform)
    return Split(f"under {folder.name}/", images, folder.names, labelled)


# -- calibration --


@dataclass(frozen=True)
class CalibrationImages:
    images: Tensor
    """Normalised images, float32 [n, C, H, W]."""
    labels: Tensor | None
    """Class index of each image, int64 [n]; None without labels."""
    description: str
    """Text for messages, for example ``256 of 50000 images under train/ (with labels)``."""
    synthetic: bool = False
    rest: Dataset[Sample] | None = None
    """Dataset of the split's images that were not drawn; None for synthetic or streamed images."""


def calibration_images(
    preprocessing: Preprocessing,
    data: DataOptions,
    *,
    count: int,
    seed: int,
    num_classes: int | None = None,
    use_labels: bool = True,
) -> CalibrationImages:
    """Return up to ``count`` class-balanced images drawn with ``seed``; without data, synthetic images."""
    if count < 1:
        raise UsageError(f"{option_name('calibration_images', count)}: expected at least 1")
    if not data.has_images:
        size = _, height, width = preprocessing.input_size
        images = synthetic_images(count, size, preprocessing.mean, preprocessing.std, seed)
        description = f"{count} synthetic images of shapes ({height}x{width})"
        return CalibrationImages(images, None, description, synthetic=True)
    options = f"{option_name('data_dir')} and {option_name('dataset')}"
    preprocessing.check_channels(f". Leave {options} out: no images are needed")
    split = open_split(
        data, "train_split", preprocessing, num_classes=num_classes, use_labels=use_labels, seed=seed
    )
    if split.stream is None:
        images, labels, description, rest = _choose(split, count, seed)
    else:
        samples = list(NamedStream(str(data.dataset), split.stream, count, preprocessing))
        images, labels, _ = collate(samples)
        rest = None
        description = f"the first {len(labels)} images {split.name}, shuffled ({split.label_note})"
        if not samples:
            raise DataError(f"images {split.name}: the dataset yielded no images. Check the split")
    if not split.labelled:
        return CalibrationImages(images, None, description, rest=rest)
    check_labels(labels, num_classes, f"images {split.name}")
    return CalibrationImages(images, labels, description, rest=rest)


def _choose(split: Split, count: int, seed: int) -> tuple[Tensor, Tensor, str, Subset[Sample] | None]:
    assert split.images is not None
    good: list[Sample] = []
    bad: list[Unreadable] = []
    order = balanced_order(split.groups, seed)
    for index in order:
        image, label = split.images[index]
        if isinstance(image, Unreadable):
            bad.append(image)
            continue
        good.append((image, label))
        if len(good) == count:
            break
    # A few damaged files are skipped. If half of them are unreadable, the folder is probably wrong.
    needed = min(count, len(split.groups))
    if 2 * len(good) < needed:
        raise DataError(
            f"{len(bad)} of {len(bad) + len(good)} images {split.name} cannot be read; {needed} are needed. "
            f"First: {bad[0].file}: {bad[0].reason}"
        )
    description = f"{len(good)} of {len(split.groups)} images {split.name} ({split.label_note})"
    if bad:
        # The text goes into slim files, so it must not contain the user's folders.
        first = "/".join(Path(bad[0].file).parts[-2:])
        description += f", {len(bad)} unreadable left out (first {first}: {bad[0].reason})"
    images, labels, _ = collate(good)
    rest = list(order)
    return images.float(), labels, description, Subset(split.images, rest) if rest else None


# -- accuracy --


class WithoutLabels(DataError):
    """Raised if accuracy is measured on images that are not in class folders."""


class EvaluationLoader:
    """Iterable of batches (images [B, C, H, W], labels [B]).

    Labels are -1 if not used. If an image could not be read, :class:`DataError` is raised after the last
    batch.
    """

    def __init__(
        self,
        samples: Dataset[Sample] | IterableDataset[Sample],
        *,
        total: int,
        batch_size: int,
        workers: int,
        num_classes: int | None,
        description: str,
        labelled: bool = True,
    ) -> None:
        self.description = description
        """Text about the images, for messages."""
        self.images = total
        """Number of images in all batches; 0 if the dataset does not state its size."""
        self.labelled = labelled
        """Whether labels are read. Otherwise, all labels are -1."""
        self._batch_size, self._num_classes = batch_size, num_classes
        # Not shuffled: pairwise comparisons need a fixed order.
        self._loader: DataLoader[Sample] = DataLoader(
            samples,
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=collate,
        )

    def __len__(self) -> int:
        return math.ceil(self.images / self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        bad: list[Unreadable] = []
        seen = 0
        for images, labels, unreadable in iter(self._loader):
            bad += unreadable
            seen += len(labels)
            if not len(labels):
                continue
            if not self.labelled:
                yield images, torch.full_like(labels, -1)
                continue
            check_labels(labels, self._num_classes, self.description)
            yield images, labels
        if bad:
            raise DataError(
                f"{self.description}: {len(bad)} of {seen + len(bad)} images cannot be read. Repair or "
                f"remove them. First: {bad[0].file}: {bad[0].reason}"
            )
        if self.images and seen != self.images:
            raise DataError(f"{self.description}: expected {self.images} images, read {seen}")
        if not seen:
            raise DataError(f"{self.description}: the dataset yielded no images. Check the split")


def evaluation_loader(
    preprocessing: Preprocessing,
    data: LabelledImages,
    *,
    num_classes: int | None,
    batch_size: int,
    limit: int | None = None,
    part: tuple[int, int] = (0, 1),
    use_labels: bool = True,
) -> EvaluationLoader:
    if data.dataset is None and data.data_dir is None:
        raise UsageError(
            f"no images to evaluate on: give {option_name('data_dir')} or {option_name('dataset')}"
        )
    split = open_split(data, "val_split", preprocessing, num_classes=num_classes, use_labels=use_labels)
    if use_labels and not split.labelled:
        assert data.data_dir is not None
        raise WithoutLabels(
            f"images without class folders {split.name}: accuracy needs {data.val_split}/<class>/<image>. "
            f"Folders in {os.fspath(data.data_dir)}: {listed(subfolders(Path(data.data_dir)))}"
        )
    samples: Dataset[Sample]
    if split.images is None:
        if part[1] > 1:
            raise DataError(
                f"images {split.name}: the dataset has no random access, so processes cannot share it. "
                "Run the command without torchrun"
            )
        total = len(split.stream)
        total = total if limit is None or not total else min(limit, total)
        description = f"{total or 'all'} images {split.name}"
        samples = NamedStream(str(data.dataset), split.stream, limit, preprocessing)
    else:
        chosen = _spread(split.groups, limit)
        if len(chosen) < part[1]:
            raise DataError(
                f"{len(chosen)} images {split.name} are fewer than {part[1]} processes. Start fewer "
                f"processes, or change {option_name('eval_images')}"
            )
        mine = chosen[part[0] :: part[1]]
        total = len(mine)
        description = f"{len(chosen)} of {len(split.groups)} images {split.name}"
        samples = Subset(split.images, mine)
    return EvaluationLoader(
        samples,
        total=total,
        batch_size=batch_size,
        # Workers would share the shards of a stream unevenly, so its images could not be counted.
        workers=0 if split.images is None else worker_count(data.workers),
        num_classes=num_classes,
        description=description,
        labelled=use_labels,
    )


def _spread(labels: Sequence[object], limit: int | None) -> list[int]:
    """Return at most ``limit`` indices, class-balanced, ascending and without randomness."""
    if limit is None or limit >= len(labels):
        return list(range(len(labels)))
    return sorted(islice(balanced_order(labels, 0), limit))
