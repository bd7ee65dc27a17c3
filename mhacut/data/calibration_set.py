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
from mhacut.data.reading import ImageFiles, Sample, Unreadable, balanced_order, collate
from mhacut.data.synthetic import synthetic_images
from mhacut.errors import DataError, UsageError


@dataclass(frozen=True)
class CalibrationImages:
    """What calibration and search look at."""

    images: Tensor
    """[n, C, H, W] float32, normalised."""
    labels: Tensor | None
    """[n] int64, indices into the model's head; None without labels."""
    description: str
    """What they are, for readers: ``256 of 50000 images under train/ (with labels)``."""


def calibration_images(
    preprocessing: Preprocessing,
    *,
    count: int,
    seed: int,
    data_dir: Path | None = None,
    dataset: str | None = None,
    class_map: Path | None = None,
    split: str = "train",
    num_classes: int | None = None,
    use_labels: bool = True,
) -> CalibrationImages:
    """``count`` images to calibrate and search on, or all there are if fewer.

    They are a random choice with equally many of each class, drawn with ``seed``: it depends on the names of
    the files, not on the order in which a file system lists them. With neither ``data_dir`` nor ``dataset``
    they are :func:`synthetic_images`.

    Args:
        preprocessing: of the model.
        count: how many.
        seed: of the choice, or of the synthesis.
        data_dir: a folder of splits (``train/``, ``val/``), one split with a folder per class, or a flat
            folder of unlabelled images; with ``dataset``, where that keeps its files.
        dataset: a dataset as timm names it, ``hfds/NAME``, ``wds/NAME``, ``tfds/NAME`` or ``torch/NAME``.
        class_map: text file, one class name a line, in the order of the model's head.
        split: of the data.
        num_classes: of the model's head, to check the data against.
        use_labels: False leaves labels out, and asks nothing of class folders.

    Raises:
        DataError: images or labels that are missing, unreadable, or do not fit the model.
        UsageError: ``count`` below 1.
    """
    if count < 1:
        raise UsageError(f"--calibration-images {count}: expected at least 1")
    if dataset is not None:
        return _from_named(
            preprocessing, count, seed, data_dir, dataset, class_map, split, num_classes, use_labels
        )
    if data_dir is None:
        _, height, width = preprocessing.input_size
        images = synthetic_images(
            count, preprocessing.input_size, preprocessing.mean, preprocessing.std, seed
        )
        return CalibrationImages(images, None, f"{count} synthetic images of shapes ({height}x{width})")
    folder = scan(find_folder(data_dir, split, "--train-split"))
    if not folder.images:
        raise DataError(
            f"{folder.path}: no images; files that count end in {', '.join(sorted(IMAGE_SUFFIXES))}. "
            "Without --data-dir, synthetic images serve"
        )
    labelled = use_labels and any(folder.names)
    labels = [-1] * len(folder.images)
    if labelled:
        labels = label_images(folder, class_map, num_classes, ", or leave labels out with --no-labels")
    files = ImageFiles(folder.path, folder.images, labels, preprocessing)
    where = f"under {folder.path.name}/"
    return _choose(files, folder.names, count, seed, where, labelled)


def _choose(
    files: Dataset[Sample], groups: Sequence[object], count: int, seed: int, where: str, labelled: bool
) -> CalibrationImages:
    """The first ``count`` readable images in :func:`balanced_order`."""
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
    if 2 * len(images) < min(count, len(groups)):
        raise DataError(
            f"{len(bad)} of {len(bad) + len(images)} images tried {where} cannot be read, {len(images)} are "
            f"left of the {min(count, len(groups))} needed. First: {bad[0].file}: {bad[0].reason}"
        )
    told = f"{len(images)} of {len(groups)} images {where} ({'with' if labelled else 'without'} labels)"
    if bad:
        # This text ends up in slim files, which need not know where somebody keeps their images.
        first = "/".join(Path(bad[0].file).parts[-2:])
        told += f", {len(bad)} unreadable left out (first {first}: {bad[0].reason})"
    return CalibrationImages(
        torch.stack(images).float(), torch.tensor(labels, dtype=torch.int64) if labelled else None, told
    )


def _from_named(
    preprocessing: Preprocessing,
    count: int,
    seed: int,
    root: Path | None,
    name: str,
    class_map: Path | None,
    split: str,
    num_classes: int | None,
    use_labels: bool,
) -> CalibrationImages:
    opened = open_named(name, root, split, class_map, num_classes, seed=seed, check_classes=use_labels)
    where = f"of {name} {split}"
    if isinstance(opened, IterableDataset):
        samples = list(NamedStream(opened, count, preprocessing))
        if not samples:
            raise DataError(f"--dataset {name}, split {split!r}: gave no images")
        images, labels, _ = collate(samples)
        told = f"the first {len(labels)} images {where}, shuffled"
        chosen = CalibrationImages(images, labels, f"{told} ({'with' if use_labels else 'without'} labels)")
    else:
        if not len(opened):
            raise DataError(f"--dataset {name}, split {split!r}: holds no images")
        everything = NamedImages(name, opened, range(len(opened)), preprocessing)
        chosen = _choose(everything, targets_of(opened), count, seed, where, use_labels)
    if not use_labels or chosen.labels is None:
        return CalibrationImages(chosen.images, None, chosen.description)
    low, high = int(chosen.labels.min()), int(chosen.labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        raise DataError(
            f"--dataset {name}: label {low if low < 0 else high} is not a class of the model's head "
            f"({num_classes} classes). Map them with --class-map, or leave labels out with --no-labels"
        )
    return chosen
