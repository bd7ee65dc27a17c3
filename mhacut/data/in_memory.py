"""Images in memory: a tensor, a tensor and labels, or batches, normalised as the model's images are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mhacut.data.calibration_set import CalibrationImages
from mhacut.data.reading import balanced_order
from mhacut.errors import DataError, UsageError, option_name
from mhacut.options.base import LabelledImages
from mhacut.text import dtype_name

ImagesInMemory = Tensor | tuple[Tensor, Tensor] | Iterable[Any]
"""Images [N, C, H, W]; these and labels [N]; or an iterable of such batches, as a ``DataLoader`` is one."""
_MEASURED = 4
"""At least one labelled image in this many is left out of the calibration, to measure accuracy on it."""
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Expected:
    """Images and labels that a model takes."""

    size: tuple[int, int, int]
    """[C, H, W]."""
    num_classes: int | None
    """Number of classes; None for a model without classifier, of which no label is read."""

    def check(self, batch: Any, where: str) -> tuple[Tensor, Tensor | None]:
        """Return the images [B, C, H, W] and the labels [B], if any, of one batch.

        Args:
            batch: whatever somebody gave.
            where: its name in messages.

        Raises:
            DataError: it is something else.
        """
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        images, labels = batch if pair else (batch, None)
        if not isinstance(images, Tensor):
            raise DataError(
                f"{where}: expected a tensor of images, or (images, labels), found {_shown(batch)}; "
                "torch.as_tensor makes a tensor of an array"
            )
        if _without_values(images):
            raise DataError(
                f"{where}: expected a dense tensor with values, found one {_without_values(images)}"
            )
        self._check_images(images, where)
        images = images.detach()
        if labels is None or self.num_classes is None:
            return images, None
        return images, self._check_labels(labels, len(images), self.num_classes, where)

    def _check_images(self, images: Tensor, where: str) -> None:
        shape, (channels, height, width) = list(images.shape), self.size
        if len(shape) != 4 or tuple(shape[1:]) != self.size:
            hint = "resize them to that"
            if len(shape) == 3:
                hint = "give batches, as a torch.utils.data.DataLoader does; images[None] is a batch of one"
            elif len(shape) == 4 and shape[3] == channels != shape[1]:
                hint = "channels come first: images.permute(0, 3, 1, 2)"
            elif len(shape) == 4 and shape[1] != channels:
                hint = f"the model takes {channels} channel(s), not {shape[1]}"
            raise DataError(
                f"{where}: expected images [N, {channels}, {height}, {width}], found {shape}; {hint}"
            )
        if len(images) == 0:
            raise DataError(f"{where}: holds no images")
        if not images.is_floating_point():
            raise DataError(
                f"{where}: expected floating-point images, normalised for the model, found "
                f"{dtype_name(images.dtype)}; for bytes that is (images / 255 - mean) / std"
            )

    def _check_labels(self, labels: Any, count: int, classes: int, where: str) -> Tensor:
        if isinstance(labels, Tensor) and _without_values(labels):
            raise DataError(
                f"{where}: expected labels in a dense tensor with values, found one {_without_values(labels)}"
            )
        fits = isinstance(labels, Tensor) and labels.dtype in _INTEGERS and labels.shape == (count,)
        if not fits:
            raise DataError(
                f"{where}: expected one whole number per image as labels, [{count}], found {_shown(labels)}"
            )
        found: Tensor = labels.to("cpu", torch.int64)
        wrong = ((found < 0) | (found >= classes)).nonzero().flatten().tolist()
        if wrong:
            raise DataError(
                f"{where}: label {int(found[wrong[0]])} of image {wrong[0]}; the model's head has {classes} "
                "classes, counted from 0. Without labels, give the images alone"
            )
        return found


class InMemoryBatches:
    """Checked batches of (images [B, C, H, W], labels [B]) to measure accuracy on.

    An iterator allows one pass, everything else several.
    """

    def __init__(self, given: ImagesInMemory, expected: Expected, batch_size: int) -> None:
        """Take images and labels.

        Args:
            given: with labels.
            expected: by the model.
            batch_size: images at a time, where they do not come in batches.
        """
        self._given, self._expected, self._batch_size = given, expected, batch_size

    def __len__(self) -> int:
        """Number of batches of a pass; 0 if nobody knows."""
        if _is_whole(self._given):
            whole: Any = self._given
            images = whole if isinstance(whole, Tensor) else whole[0]
            return math.ceil(len(images) / self._batch_size) if isinstance(images, Sized) else 0
        return len(self._given) if isinstance(self._given, Sized) else 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for where, images, labels in _batches(self._given, self._expected):
            if labels is None:
                raise DataError(
                    f"{where}: images without labels, which accuracy needs; give "
                    f"images=(images, labels), or batches of both"
                )
            parts = (images, labels)
            size = self._batch_size if _is_whole(self._given) else max(len(images), 1)
            _check_finite(images, range(len(images)), where)
            for some, their_labels in zip(*(part.split(size) for part in parts), strict=True):
                yield some.float(), their_labels


def check_one_source(images: ImagesInMemory | None, data: LabelledImages) -> None:
    """Raise a :class:`UsageError` if images are given both in memory and by an option."""
    if images is None or not data.has_images:
        return
    other = "data_dir" if data.data_dir is not None else "dataset"
    raise UsageError(f"images and {option_name(other)} are both given; leave one out")


def split_in_memory(
    given: ImagesInMemory,
    expected: Expected,
    *,
    count: int,
    measured: int,
    seed: int,
    batch_size: int,
) -> tuple[CalibrationImages, InMemoryBatches | None]:
    """Divide images into those to calibrate on, and labelled ones to measure accuracy on.

    Both are random choices with equally many of each class, drawn with ``seed``. No image is in both; if
    there are too few, a quarter of them is used to measure. Batches are read only until there are enough
    images.

    Args:
        given: images, with or without labels.
        expected: by the model.
        count: number of images to calibrate on, or all there are if fewer.
        measured: largest number of images to measure accuracy on; 0 for none.
        seed: of the choice.
        batch_size: images at a time when accuracy is measured.

    Returns:
        The second is None without labels, without a classifier, or if there are too few images.

    Raises:
        DataError: there are no images, or they do not fit the model.
    """
    images, labels, more = _collected(given, expected, count, measured)
    total = len(images)
    left = 0 if labels is None else min(measured, max(total - count, total // _MEASURED))
    groups = [0] * total if labels is None else labels.tolist()
    order = list(balanced_order(groups, seed))
    fitted = order[: min(count, total - left)]
    others = order[len(fitted) :][:left]
    where = "images"
    _check_finite(images, [*fitted, *others], where)
    calibration = CalibrationImages(
        images[fitted].float().cpu(),
        None if labels is None else labels[fitted],
        f"{len(fitted)} of {'the first ' if more else ''}{total} images in memory "
        f"({'without' if labels is None else 'with'} labels)",
    )
    if labels is None or not others:
        return calibration, None
    return calibration, InMemoryBatches((images[others].cpu(), labels[others]), expected, batch_size)


def _collected(
    given: ImagesInMemory, expected: Expected, count: int, measured: int
) -> tuple[Tensor, Tensor | None, bool]:
    """Return images, labels, and whether there may be more; batches are read until there are enough."""
    images: list[Tensor] = []
    labels: list[Tensor | None] = []
    total, enough = 0, False
    for where, some, their_labels in _batches(given, expected):
        if labels and (labels[0] is None) != (their_labels is None):
            raise DataError(f"{where}: some batches have labels, and others have none")
        images.append(some)
        labels.append(their_labels)
        total += len(some)
        enough = total >= count + (0 if their_labels is None else measured)
        if enough:
            break
    if not total:
        raise DataError("images: holds no images")
    known = [one for one in labels if one is not None]
    whole = images[0] if len(images) == 1 else torch.cat([one.cpu() for one in images])
    return whole, torch.cat(known) if known else None, enough and not _is_whole(given)


def _is_whole(given: ImagesInMemory) -> bool:
    """Whether all images are one batch; a ``DataLoader`` makes a list of its images and labels."""
    if isinstance(given, list) and len(given) == 2:
        images, labels = given
        return isinstance(images, Tensor) and isinstance(labels, Tensor) and labels.ndim < images.ndim
    return isinstance(given, Tensor | tuple)


def _batches(given: ImagesInMemory, expected: Expected) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Give checked batches, each with its name in messages."""
    name = "images"
    if _is_whole(given):
        yield name, *expected.check(given, name)
        return
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | dict):
        hint = "; give a DataLoader of it" if isinstance(given, Dataset) else ""
        raise UsageError(
            f"{name}: expected a tensor, (images, labels), or a DataLoader, found {_shown(given)}{hint}"
        )
    for number, batch in enumerate(given, 1):
        where = f"{name}, batch {number}"
        yield where, *expected.check(batch, where)


def _without_values(tensor: Tensor) -> str:
    """Say what keeps the values of ``tensor`` from being read one by one; empty if nothing does."""
    if tensor.is_meta:
        return "on the meta device, which holds no values"
    if tensor.is_nested:
        return "that is nested"
    return "" if tensor.layout == torch.strided else f"of layout {str(tensor.layout).removeprefix('torch.')}"


def _check_finite(images: Tensor, chosen: Iterable[int], where: str) -> None:
    """Raise a :class:`DataError` if one of the chosen images holds NaN or infinity; image by image."""
    for index in chosen:
        if not bool(images[index].isfinite().all()):
            raise DataError(
                f"{where}: image {index} holds NaN or infinite values; leave it out, or check the "
                "normalisation"
            )


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {dtype_name(value.dtype)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__
