"""Images to calibrate and search on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from mhacut.data.folders import IMAGE_SUFFIXES, find_folder, label_images, scan
from mhacut.data.named import NamedImages, NamedStream, open_named, targets_of
from mhacut.data.preprocessing import Preprocessing
from mhacut.data.reading import ImageFiles, Sample, Unreadable, balanced_order, collate, label_outside
from mhacut.data.synthetic import synthetic_images
from mhacut.errors import DataError, UsageError, option_name
from mhacut.options.base import DataOptions


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
        preprocessing: of the model.
        data: a folder or a named dataset, whose ``train_split`` is read. The folder holds splits (``train/``,
            ``val/``), one folder per class, or unlabelled images.
        count: number of images.
        seed: of the choice, or of the synthesis.
        num_classes: of the model's head, to check the data against.
        use_labels: False ignores labels, and needs no class folders.

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
        return _from_named(preprocessing, data, count, seed, num_classes, use_labels)
    if data.data_dir is not None:
        return _from_folder(preprocessing, data, count, seed, num_classes, use_labels)
    _, height, width = preprocessing.input_size
    images = synthetic_images(count, preprocessing.input_size, preprocessing.mean, preprocessing.std, seed)
    return CalibrationImages(images, None, f"{count} synthetic images of shapes ({height}x{width})")


def _from_folder(
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
        labels = label_images(folder, data, num_classes, hint, other=data.val_split)
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


def _from_named(
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
        images, labels, bad = collate(samples)
        left_out = _left_out(bad, len(labels), len(samples), where)
        with_labels = "with labels" if use_labels else "without labels"
        description = f"the first {len(labels)} images {where}, shuffled ({with_labels}){left_out}"
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
