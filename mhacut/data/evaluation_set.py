"""Labelled images to measure accuracy on."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mhacut.data.folders import find_folder, label_images, listed, scan, subfolders
from mhacut.data.named import NamedImages, NamedStream, open_named, targets_of
from mhacut.data.preprocessing import Preprocessing
from mhacut.data.reading import (
    ImageFiles,
    Sample,
    Unreadable,
    balanced_order,
    collate,
    fingerprint,
    label_outside,
)
from mhacut.errors import DataError, UsageError, option_name
from mhacut.options.base import DataOptions, LabelledImages
from mhacut.runtime.process import outlive_signals, worker_count


class WithoutLabels(DataError):
    """Images to measure accuracy on that lie in no class folders."""


class EvaluationLoader:
    """Batches of (images [B, C, H, W], labels [B]) that never drop an image silently.

    It can be iterated more than once. At the end of a pass it raises :class:`DataError` if an image could not
    be read, so that no accuracy is computed on the rest.
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
        fingerprint: str,
    ) -> None:
        self.fingerprint = fingerprint
        """Digest of all images that are measured, not only of the part read here; equal for equal data."""
        self.description = description
        """Text for readers."""
        self.images = total
        """Number of images of a pass; 0 if a stream does not state it."""
        self._batch_size, self._num_classes = batch_size, num_classes
        self._loader: DataLoader[Sample] = DataLoader(
            samples,
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=outlive_signals,
        )

    def __len__(self) -> int:
        """Number of batches of a pass; 0 if a stream does not state it."""
        return math.ceil(self.images / self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        bad: list[Unreadable] = []
        seen = 0
        for images, labels, unreadable in self._loader:
            bad += unreadable
            seen += len(labels)
            if not len(labels):
                continue
            wrong = label_outside(labels, self._num_classes)
            if wrong is not None:
                raise DataError(
                    f"{self.description}: found label {wrong}, the model's head has "
                    f"{self._num_classes} classes, counted from 0. Map the classes with "
                    f"{option_name('class_map')}"
                )
            yield images, labels
        if bad:
            raise DataError(
                f"{self.description}: {len(bad)} of {seen + len(bad)} images cannot be read, so no accuracy "
                f"is given. First: {bad[0].file}: {bad[0].reason}. Repair or remove them"
            )
        if self.images and seen != self.images:
            raise DataError(
                f"{self.description}: {self.images} images were announced, {seen} arrived; no accuracy is "
                "given"
            )
        if not seen:
            raise DataError(f"{self.description}: no images arrived")


def evaluation_loader(
    preprocessing: Preprocessing,
    data: LabelledImages,
    *,
    num_classes: int | None,
    batch_size: int,
    limit: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> EvaluationLoader:
    """Return the labelled images of ``data.val_split``, to measure accuracy on.

    Args:
        preprocessing: of the model.
        data: a folder of splits, one split with a folder per class, or a named dataset.
        num_classes: of the model's head, to check the data against.
        batch_size: images at a time.
        limit: largest number of images, the same choice every time, even over the classes; None for all.
        part: (i, n) for the i-th of n parts of the images, counted from 0, nearly equal in size.

    Raises:
        WithoutLabels: a folder of images without class folders.
        DataError: images or labels that are missing or do not fit the model. Unreadable images raise the same
            error at the end of a pass.
        UsageError: ``data`` names no images, or ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}: expected at least 1 image")
    if data.dataset is not None:
        chosen = _from_named(preprocessing, data, num_classes, limit, part)
    elif data.data_dir is not None:
        chosen = _from_folder(preprocessing, data, num_classes, limit, part)
    else:
        raise UsageError(
            f"nothing to evaluate on: give {option_name('data_dir')} or {option_name('dataset')}"
        )
    return EvaluationLoader(
        chosen.samples,
        total=chosen.total,
        batch_size=batch_size,
        # Shards are divided among workers unevenly, and a stream's images could then not be counted.
        workers=0 if isinstance(chosen.samples, IterableDataset) else worker_count(data.workers),
        num_classes=num_classes,
        description=chosen.description,
        fingerprint=chosen.fingerprint,
    )


@dataclass(frozen=True)
class _Chosen:
    """One part of the images of a split."""

    samples: Dataset[Sample] | IterableDataset[Sample]
    total: int
    """Number of images in the part; 0 if a stream does not state it."""
    description: str
    """All parts together, for readers."""
    fingerprint: str
    """All parts together."""


def _from_folder(
    preprocessing: Preprocessing,
    data: LabelledImages,
    num_classes: int | None,
    limit: int | None,
    part: tuple[int, int],
) -> _Chosen:
    assert data.data_dir is not None
    folder = scan(find_folder(data.data_dir, data.val_split, "val_split"))
    if not folder.images:
        raise DataError(f"{folder.path}: no images; folders there: {listed(folder.classes)}")
    if not any(folder.names):
        raise WithoutLabels(
            f"{folder.path}: images without class folders; accuracy needs {data.val_split}/<class>/<image>. "
            f"Folders in {os.fspath(data.data_dir)}: {listed(subfolders(Path(data.data_dir)))}"
        )
    # Whoever reads a training split too compares it with this one, if it uses the labels of both.
    other = None if isinstance(data, DataOptions) else "train"
    labels = label_images(folder, data, num_classes, "", other=other)
    indices = _spread(labels, limit)
    images, labels = [folder.images[index] for index in indices], [labels[index] for index in indices]
    first, step = _checked_part(part, len(images))
    files = ImageFiles(folder.path, images[first::step], labels[first::step], preprocessing)
    description = f"{len(images)} of {len(folder.images)} images under {folder.name}/"
    return _Chosen(files, len(files), description, fingerprint(images, labels))


def _from_named(
    preprocessing: Preprocessing,
    data: LabelledImages,
    num_classes: int | None,
    limit: int | None,
    part: tuple[int, int],
) -> _Chosen:
    name, split = str(data.dataset), data.val_split
    opened = open_named(data, split, num_classes, check_classes=True)
    if isinstance(opened, IterableDataset):
        if part[1] > 1:
            raise DataError(
                f"{option_name('dataset', name)}: is a stream, which several processes cannot share"
            )
        total = len(opened)  # type: ignore[arg-type]  # 0 where a stream does not know
        total = total if limit is None or not total else min(limit, total)
        description = f"{total or 'all'} images of {name} {split}"
        stream = NamedStream(name, opened, limit, preprocessing)
        return _Chosen(stream, total, description, fingerprint([name, split], [total]))
    targets = targets_of(name, opened)
    indices = _spread(targets, limit)
    first, step = _checked_part(part, len(indices))
    images = NamedImages(name, opened, indices[first::step], preprocessing)
    description = f"{len(indices) or 'all'} images of {name} {split}"
    whole = fingerprint([name, split], [targets[index] for index in indices])
    return _Chosen(images, len(images), description, whole)


def _checked_part(part: tuple[int, int], images: int) -> tuple[int, int]:
    """Return ``part`` unless some of the parts would be empty."""
    first, step = part
    if step > max(images, 1):
        raise DataError(
            f"{images} images to measure accuracy on are fewer than the {step} processes that share them; "
            f"start fewer processes, or change {option_name('eval_images')} (0 measures none)"
        )
    return first, step


def _spread(labels: Sequence[object], limit: int | None) -> list[int]:
    """Indices of at most ``limit`` images, ascending: the same choice every time, even over the labels."""
    if limit is None or limit >= len(labels):
        return list(range(len(labels)))
    return sorted(islice(balanced_order(labels, 0), limit))
