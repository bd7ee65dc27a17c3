"""Normalised images in memory: a tensor, (images, labels), or batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from mhacut.data.reading import Sample, balanced_order, label_outside
from mhacut.data.sets import CalibrationImages
from mhacut.errors import DataError, UsageError, option_name
from mhacut.options.base import LabelledImages
from mhacut.text import dtype_name

ImagesInMemory = Tensor | tuple[Tensor, Tensor] | Iterable[Any]
"""Images [N, C, H, W], (images, labels [N]), or an iterable of such batches (a DataLoader)."""
_MEASURED = 4
"""If labelled images are few, 1 in 4 measures accuracy. The other images are for calibration."""


@dataclass(frozen=True)
class Expected:
    """Image size and number of classes of a model, with which users' images and labels are checked."""

    size: tuple[int, int, int]
    """Image size (channels, height, width)."""
    num_classes: int | None
    """Number of classes; None for a model without classifier, whose labels are ignored."""

    def check(self, batch: Any, where: str) -> tuple[Tensor, Tensor | None]:
        """Return the images [B, C, H, W] and the labels [B] of ``batch``, or raise :class:`DataError`."""
        if isinstance(batch, Mapping) and "pixel_values" in batch:  # as transformers' data collators yield
            batch = batch["pixel_values"], batch.get("labels")
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        images, labels = batch if pair else (batch, None)
        if not isinstance(images, Tensor):
            raise DataError(
                f"{where}: expected a tensor of images or (images, labels), found {_describe(batch)}. "
                "Convert arrays with torch.as_tensor"
            )
        self._check_images(images, where)
        images = images.detach()
        if labels is None or self.num_classes is None:
            return images, None
        return images, self._check_labels(labels, len(images), self.num_classes, where)

    def _check_images(self, images: Tensor, where: str) -> None:
        shape, (channels, height, width) = list(images.shape), self.size
        if len(shape) != 4 or tuple(shape[1:]) != self.size:
            raise DataError(
                f"{where}: expected images [N, {channels}, {height}, {width}], found {shape}. Resize them or "
                "reorder the dimensions"
            )
        if len(images) == 0:
            raise DataError(f"{where}: expected at least 1 image, found none")
        if not images.is_floating_point():
            raise DataError(
                f"{where}: expected normalised float images, found {dtype_name(images.dtype)}. Convert bytes "
                "with (images / 255 - mean) / std"
            )

    def _check_labels(self, labels: Any, count: int, classes: int, where: str) -> Tensor:
        fits = isinstance(labels, Tensor) and labels.shape == (count,) and not labels.is_floating_point()
        if not fits:
            raise DataError(f"{where}: expected integer labels [{count}], found {_describe(labels)}")
        numbers: Tensor = labels.to("cpu", torch.int64)
        wrong = label_outside(numbers, classes)
        if wrong is not None:
            raise DataError(
                f"{where}: found label {wrong}, expected 0 to {classes - 1}. To ignore labels, give only the "
                "images"
            )
        return numbers


class InMemoryBatches:
    """Iterable of checked batches (images [B, C, H, W], labels [B]) for measuring accuracy."""

    def __init__(self, given: ImagesInMemory, expected: Expected, batch_size: int) -> None:
        self._given, self._expected, self._batch_size = given, expected, batch_size

    def __len__(self) -> int:
        given: Any = self._given
        if _is_whole(given):
            return math.ceil(len(given if isinstance(given, Tensor) else given[0]) / self._batch_size)
        return len(given) if isinstance(given, Sized) else 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for where, images, labels in _batches(self._given, self._expected):
            if labels is None:
                raise DataError(
                    f"{where}: accuracy needs labels. Give images=(images, labels), or batches of both"
                )
            parts = (images, labels)
            size = self._batch_size if _is_whole(self._given) else max(len(images), 1)
            _check_finite(images, where)
            for some, their_labels in zip(*(part.split(size) for part in parts), strict=True):
                yield some.float(), their_labels


def check_one_source(images: ImagesInMemory | None, data: LabelledImages) -> None:
    if images is None or not data.has_images:
        return
    other = "data_dir" if data.data_dir is not None else "dataset"
    raise UsageError(f"images and {option_name(other)} are both given. Leave one out")


def split_in_memory(
    given: ImagesInMemory,
    expected: Expected,
    *,
    count: int,
    measured: int,
    seed: int,
    batch_size: int,
) -> tuple[CalibrationImages, InMemoryBatches | None]:
    """Split images into calibration images and labelled images for measuring accuracy.

    Both are random and class-balanced, and they share no image. Batches are read until there are enough
    images.
    """
    source, unread = _spread(given, count + measured, seed)
    images, labels, more = _collected(source, expected, count, measured)
    total = len(images)
    # Calibration comes first, but leaves a quarter of the images for accuracy.
    left = 0 if labels is None else min(measured, max(total - count, total // _MEASURED))
    groups = [0] * total if labels is None else labels.tolist()
    order = list(balanced_order(groups, seed))
    fitted = order[: min(count, total - left)]
    others = order[len(fitted) :][:left]
    if len(fitted) + left < total:
        unread = _Images(TensorDataset(images), order[len(fitted) + left :])
    chosen, rest = images[fitted].float(), images[others]
    for some in (chosen, rest):
        _check_finite(some, "images")
    pool = f"{'the first ' if more else ''}{total}" if source is given else f"{len(given.dataset)}"  # type: ignore[union-attr]
    calibration = CalibrationImages(
        chosen,
        None if labels is None else labels[fitted],
        f"{len(fitted)} of {pool} images in memory ({'without' if labels is None else 'with'} labels)",
        rest=unread,
    )
    if labels is None or not others:
        return calibration, None
    return calibration, InMemoryBatches((rest, labels[others]), expected, batch_size)


def _collected(
    given: ImagesInMemory, expected: Expected, count: int, measured: int
) -> tuple[Tensor, Tensor | None, bool]:
    """Read batches until they hold enough images. Return images, labels, and whether more may follow."""
    images: list[Tensor] = []
    labels: list[Tensor | None] = []
    total, enough = 0, False
    for where, some, their_labels in _batches(given, expected):
        if labels and (labels[0] is None) != (their_labels is None):
            raise DataError(f"{where}: expected labels in all batches or in none")
        images.append(some)
        labels.append(their_labels)
        total += len(some)
        enough = total >= count + (0 if their_labels is None else measured)
        if enough:
            break
    if not total:
        raise DataError("images: expected at least 1 image, found none")
    present = [batch for batch in labels if batch is not None]
    joined = images[0] if len(images) == 1 else torch.cat([batch.cpu() for batch in images])
    return joined.cpu(), torch.cat(present) if present else None, enough and not _is_whole(given)


def _spread(given: ImagesInMemory, count: int, seed: int) -> tuple[ImagesInMemory, _Images | None]:
    """Return a loader of ``count`` random images of a DataLoader, and a dataset of the other images."""
    if not isinstance(given, DataLoader) or given.batch_size is None:
        return given, None
    total = len(given.dataset) if isinstance(given.dataset, Sized) else 0
    if type(given.sampler) not in (SequentialSampler, RandomSampler) or count >= total:
        return given, None
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    kept = ("batch_size", "num_workers", "collate_fn", "worker_init_fn", "multiprocessing_context")
    chosen = Subset(given.dataset, order[:count])
    # A custom collate_fn works on batches only, so single items cannot be read.
    unread = _Images(given.dataset, order[count:]) if given.collate_fn is default_collate else None
    return DataLoader(chosen, **{name: getattr(given, name) for name in kept}), unread


class _Images(Dataset[Sample]):
    def __init__(self, dataset: Any, chosen: Sequence[int]) -> None:
        self._dataset, self._chosen = dataset, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Sample:
        item = self._dataset[self._chosen[index]]
        return (item[0] if isinstance(item, tuple | list) else item), 0


def _is_whole(given: ImagesInMemory) -> bool:
    """Whether ``given`` is a single batch. A list [images, labels], as DataLoaders yield, is a batch."""
    if isinstance(given, list) and len(given) == 2:
        images, labels = given
        return isinstance(images, Tensor) and isinstance(labels, Tensor) and labels.ndim < images.ndim
    return isinstance(given, Tensor | tuple)


def _batches(given: ImagesInMemory, expected: Expected) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    name = "images"
    if _is_whole(given):
        yield name, *expected.check(given, name)
        return
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | dict):
        raise UsageError(
            f"{name}: expected a tensor, (images, labels), or a DataLoader, found {_describe(given)}"
        )
    for number, batch in enumerate(given, 1):
        where = f"{name}, batch {number}"
        yield where, *expected.check(batch, where)


def _check_finite(images: Tensor, where: str) -> None:
    if not bool(images.isfinite().all()):
        raise DataError(f"{where}: an image holds NaN or infinite values. Check the normalisation")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {dtype_name(value.dtype)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__
