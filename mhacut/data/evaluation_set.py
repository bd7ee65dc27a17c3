"""Labelled images to measure accuracy on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mhacut.data.folders import find_folder, label_images, listed, scan, subfolders
from mhacut.data.named import NamedImages, NamedStream, open_named, targets_of
from mhacut.data.preprocessing import Preprocessing
from mhacut.data.reading import ImageFiles, Sample, Unreadable, balanced_order, collate, fingerprint
from mhacut.data.workers import outlive_first_signal, start_reading
from mhacut.errors import DataError, UsageError


class EvaluationLoader:
    """Batches of (images [B, C, H, W], labels [B]) that never leave an image out in silence.

    It can be iterated more than once. At the end of a pass it raises :class:`DataError` if an image could not
    be read, so that no accuracy is worked out on what happened to be left.
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
        """Of what is measured, whatever part of it is read here; equal for equal data."""
        self.description = description
        """What is read, for readers."""
        self.images = total
        """How many images a pass gives; 0 if a stream does not say."""
        self._batch_size, self._num_classes = batch_size, num_classes
        self._loader: DataLoader[Sample] = DataLoader(
            samples,
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=outlive_first_signal,
        )

    def __len__(self) -> int:
        """Batches of a pass; 0 if a stream does not say."""
        return math.ceil(self.images / self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        bad: list[Unreadable] = []
        seen = 0
        for images, labels, unreadable in start_reading(self._loader):
            bad += unreadable
            seen += len(labels)
            if not len(labels):
                continue
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or (self._num_classes is not None and high >= self._num_classes):
                raise DataError(
                    f"{self.description}: found label {low if low < 0 else high}, the model's head has "
                    f"{self._num_classes} classes, counted from 0. Map the classes with --class-map"
                )
            yield images, labels
        if bad:
            raise DataError(
                f"{self.description}: {len(bad)} of {seen + len(bad)} images cannot be read, so no accuracy "
                f"is given. First: {bad[0].file}: {bad[0].reason}. Repair or remove them"
            )
        if self.images and seen != self.images:
            raise DataError(
                f"{self.description}: {seen} images came of {self.images} announced; no accuracy is given"
            )
        if not seen:
            raise DataError(f"{self.description}: no images came")


def evaluation_loader(
    preprocessing: Preprocessing,
    *,
    data_dir: Path | None = None,
    dataset: str | None = None,
    batch_size: int,
    workers: int,
    split: str = "val",
    num_classes: int | None,
    class_map: Path | None = None,
    limit: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> EvaluationLoader:
    """Labelled images of ``split`` to measure accuracy on.

    Args:
        preprocessing: of the model.
        data_dir: a folder of splits, or one split with a folder per class.
        dataset: a dataset as timm names it.
        batch_size: images at a time.
        workers: processes that read images; 0 reads in this one.
        split: of the data.
        num_classes: of the model's head, to check the data against.
        class_map: text file, one class name a line, in the order of the model's head.
        limit: at most so many images, chosen evenly over the classes and always alike; None for all.
        part: (i, n) for the i-th of n parts of the images, counted from 0, nearly equal in size.

    Raises:
        DataError: images or labels that are missing or do not fit the model. Unreadable images come to light
            at the end of a pass, as the same error.
        UsageError: neither or no place to look.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}: expected at least 1 image")
    if dataset is not None:
        return _from_named(
            preprocessing,
            data_dir,
            dataset,
            batch_size,
            workers,
            split,
            num_classes,
            class_map,
            limit,
            part,
        )
    if data_dir is None:
        raise UsageError("nothing to evaluate on: give --data-dir or --dataset")
    folder = scan(find_folder(data_dir, split, "--val-split"))
    if not folder.images:
        raise DataError(f"{folder.path}: no images; folders there: {listed(folder.classes)}")
    if not any(folder.names):
        raise DataError(
            f"{folder.path}: images without class folders; accuracy needs {split}/<class>/<image>. "
            f"Folders in {data_dir}: {listed(subfolders(data_dir))}"
        )
    labels = label_images(folder, class_map, num_classes, "")
    images: Sequence[str] = folder.images
    if limit is not None and limit < len(images):
        chosen = sorted(index for index, _ in zip(balanced_order(labels, 0), range(limit), strict=False))
        images, labels = [images[index] for index in chosen], [labels[index] for index in chosen]
    description = f"{len(images)} of {len(folder.images)} images under {folder.path.name}/"
    whole = fingerprint(images, labels)
    images, labels = images[part[0] :: part[1]], labels[part[0] :: part[1]]
    files = ImageFiles(folder.path, images, labels, preprocessing)
    return EvaluationLoader(
        files,
        total=len(images),
        batch_size=batch_size,
        workers=workers,
        num_classes=num_classes,
        description=description,
        fingerprint=whole,
    )


def _from_named(
    preprocessing: Preprocessing,
    root: Path | None,
    name: str,
    batch_size: int,
    workers: int,
    split: str,
    num_classes: int | None,
    class_map: Path | None,
    limit: int | None,
    part: tuple[int, int],
) -> EvaluationLoader:
    opened = open_named(name, root, split, class_map, num_classes, check_classes=True)
    samples: Dataset[Sample] | IterableDataset[Sample]
    if isinstance(opened, IterableDataset):
        if part[1] > 1:
            raise DataError(f"--dataset {name}: is a stream, which several processes cannot share")
        total = len(opened)  # type: ignore[arg-type]  # 0 where a stream does not know
        total = total if limit is None or not total else min(limit, total)
        all_of_them = total
        whole = fingerprint([name, split], [total])
        samples = NamedStream(opened, limit, preprocessing)
        # Shards are divided among workers unevenly, which would make the count below meaningless.
        workers = 0
    else:
        indices, targets = list(range(len(opened))), targets_of(opened)
        if limit is not None and limit < len(indices):
            order = balanced_order(targets, 0)
            indices = sorted(index for index, _ in zip(order, range(limit), strict=False))
        all_of_them = len(indices)
        whole = fingerprint([name, split], [targets[index] for index in indices])
        indices = indices[part[0] :: part[1]]
        samples, total = NamedImages(name, opened, indices, preprocessing), len(indices)
    return EvaluationLoader(
        samples,
        total=total,
        batch_size=batch_size,
        workers=workers,
        num_classes=num_classes,
        description=f"{all_of_them or 'all'} images of {name} {split}",
        fingerprint=whole,
    )
