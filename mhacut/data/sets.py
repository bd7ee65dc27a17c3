"""The images of a command: those to calibrate and search on, and labelled ones to measure accuracy on."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mhacut.data.folders import IMAGE_SUFFIXES, find_folder, label_images, scan, subfolders
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
from mhacut.data.synthetic import synthetic_images
from mhacut.errors import DataError, UsageError, option_name
from mhacut.options.base import DataOptions, LabelledImages
from mhacut.runtime.process import outlive_signals, worker_count
from mhacut.text import listed


@dataclass(frozen=True)
class CalibrationImages:
    """Images of calibration and search."""

    images: Tensor
    """[n, C, H, W] float32, normalised."""
    labels: Tensor | None
    """[n] int64, indices into the model's head; None without labels."""
    description: str
    """Text for readers: ``256 of 50000 images under train/ (with labels)``."""


def calibration_images(
    preprocessing: Preprocessing,
    data: DataOptions,
    *,
    count: int,
    seed: int,
    num_classes: int | None = None,
    use_labels: bool = True,
) -> CalibrationImages:
    """Return ``count`` images to calibrate and search on, or all there are if fewer.

    They are a random choice with equally many of each class, drawn with ``seed``: it depends on the names of
    the files, not on the order in which a file system lists them. If ``data`` names no images, they are
    :func:`synthetic_images`.

    Args:
        preprocessing: preprocessing of the model.
        data: options that name a folder or a dataset, whose ``train_split`` is read. The folder holds splits
            (``train/``, ``val/``), one folder per class, or unlabelled images.
        count: number of images.
        seed: seed of the choice, or of the synthesis.
        num_classes: number of classes of the model's head, to check the data against.
        use_labels: whether to read labels; False ignores labels, and needs no class folders.

    Raises:
        DataError: images or labels that are missing, unreadable, or do not fit the model.
        UsageError: ``count`` below 1.
    """
    if count < 1:
        raise UsageError(f"{option_name('calibration_images', count)}: expected at least 1")
    if data.has_images:
        given = f"{option_name('data_dir')} and {option_name('dataset')}"
        preprocessing.check_channels(f"; leave {given} out, no images are needed")
    if data.dataset is not None:
        return _calibration_dataset(preprocessing, data, count, seed, num_classes, use_labels)
    if data.data_dir is not None:
        return _calibration_folder(preprocessing, data, count, seed, num_classes, use_labels)
    _, height, width = preprocessing.input_size
    images = synthetic_images(count, preprocessing.input_size, preprocessing.mean, preprocessing.std, seed)
    return CalibrationImages(images, None, f"{count} synthetic images of shapes ({height}x{width})")


def _calibration_folder(
    preprocessing: Preprocessing,
    data: DataOptions,
    count: int,
    seed: int,
    num_classes: int | None,
    use_labels: bool,
) -> CalibrationImages:
    assert data.data_dir is not None
    folder = scan(find_folder(data.data_dir, data.train_split, "train_split"))
    if not folder.images:
        raise DataError(
            f"{folder.path}: no images found; the names of image files end in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}; without {option_name('data_dir')}, none are needed"
        )
    labelled = use_labels and any(folder.names)
    labels = [-1] * len(folder.images)
    if labelled:
        hint = f", or leave labels out with {option_name('labels', False)}"
        labels = label_images(folder, data, num_classes, hint)
    files = ImageFiles(folder.path, folder.images, labels, preprocessing)
    return _choose(files, folder.names, count, seed, f"under {folder.name}/", labelled)


def _choose(
    files: Dataset[Sample], groups: Sequence[object], count: int, seed: int, where: str, labelled: bool
) -> CalibrationImages:
    """Return the first ``count`` readable images in :func:`balanced_order`."""
    images: list[Tensor] = []
    labels: list[int] = []
    bad: list[Unreadable] = []
    for index in balanced_order(groups, seed):
        image, label = files[index]
        if isinstance(image, Unreadable):
            bad.append(image)
            continue
        images.append(image)
        labels.append(label)
        if len(images) == count:
            break
    left_out = _left_out(bad, len(images), min(count, len(groups)), where)
    with_labels = "with labels" if labelled else "without labels"
    description = f"{len(images)} of {len(groups)} images {where} ({with_labels}){left_out}"
    indices = torch.tensor(labels, dtype=torch.int64) if labelled else None
    return CalibrationImages(torch.stack(images).float(), indices, description)


def _left_out(bad: Sequence[Unreadable], readable: int, needed: int, where: str) -> str:
    """Return what a description says of unreadable images; empty without any.

    Raises:
        DataError: fewer than half of the images that are needed are readable.
    """
    if 2 * readable < needed:
        raise DataError(
            f"{len(bad)} of {len(bad) + readable} images {where} cannot be read, which leaves {readable} of "
            f"the {needed} needed. First: {bad[0].file}: {bad[0].reason}"
        )
    if not bad:
        return ""
    # This text ends up in slim files, which need not know where somebody keeps their images.
    first = "/".join(Path(bad[0].file).parts[-2:])
    return f", {len(bad)} unreadable left out (first {first}: {bad[0].reason})"


def _calibration_dataset(
    preprocessing: Preprocessing,
    data: DataOptions,
    count: int,
    seed: int,
    num_classes: int | None,
    use_labels: bool,
) -> CalibrationImages:
    name, split = str(data.dataset), data.train_split
    opened = open_named(data, split, num_classes, seed=seed, check_classes=use_labels)
    where = f"of {name} {split}"
    if isinstance(opened, IterableDataset):
        samples = list(NamedStream(name, opened, count, preprocessing))
        if not samples:
            raise DataError(f"{option_name('dataset', name)}, split {split!r}: gave no images")
        images, labels, _ = collate(samples)
        with_labels = "with labels" if use_labels else "without labels"
        description = f"the first {len(labels)} images {where}, shuffled ({with_labels})"
        chosen = CalibrationImages(images, labels, description)
    else:
        if not len(opened):
            raise DataError(f"{option_name('dataset', name)}, split {split!r}: holds no images")
        everything = NamedImages(name, opened, range(len(opened)), preprocessing)
        chosen = _choose(everything, targets_of(name, opened), count, seed, where, use_labels)
    if not use_labels or chosen.labels is None:
        return CalibrationImages(chosen.images, None, chosen.description)
    wrong = label_outside(chosen.labels, num_classes)
    if wrong is not None:
        raise DataError(
            f"{option_name('dataset', name)}: label {wrong} is not a class of the model's "
            f"head ({num_classes} classes). Map them with {option_name('class_map')}, or leave labels out "
            f"with {option_name('labels', False)}"
        )
    return chosen


# -- accuracy --


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
        preprocessing: preprocessing of the model.
        data: options that name a folder of splits, one split with a folder per class, or a named dataset.
        num_classes: number of classes of the model's head, to check the data against.
        batch_size: number of images at a time.
        limit: largest number of images, the same choice every time, even over the classes; None for all.
        part: pair (i, n) for the i-th of n parts of the images, counted from 0, nearly equal in size.

    Raises:
        WithoutLabels: a folder of images without class folders.
        DataError: images or labels that are missing or do not fit the model. Unreadable images raise the same
            error at the end of a pass.
        UsageError: ``data`` names no images.
    """
    if data.dataset is not None:
        chosen = _evaluation_dataset(preprocessing, data, num_classes, limit, part)
    elif data.data_dir is not None:
        chosen = _evaluation_folder(preprocessing, data, num_classes, limit, part)
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


def _evaluation_folder(
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
    labels = label_images(folder, data, num_classes, "")
    indices = _spread(labels, limit)
    images, labels = [folder.images[index] for index in indices], [labels[index] for index in indices]
    first, step = _checked_part(part, len(images))
    files = ImageFiles(folder.path, images[first::step], labels[first::step], preprocessing)
    description = f"{len(images)} of {len(folder.images)} images under {folder.name}/"
    return _Chosen(files, len(files), description, fingerprint(images, labels))


def _evaluation_dataset(
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
