"""Augmented training images in batches that any number of processes can share.

The augmentation of an image depends only on the seed of the run, the epoch and the image. So a resumed run,
or a run on other machines, sees the same images.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from mhacut.data import Preprocessing
from mhacut.data.preprocessing import Transform
from mhacut.data.reading import Sample, Unreadable, check_labels
from mhacut.data.sets import open_split
from mhacut.errors import DataError, UsageError, option_name
from mhacut.options.base import DataOptions
from mhacut.options.finetune import AugmentationOptions

_MAX_TRIES = 10
"""Largest number of images that are tried for a place in a batch until an image can be read."""

Drawn = tuple["Tensor | None", int, list[Unreadable]]
"""Result of reading an image: (image or None, label or -1, unreadable images that were tried before)."""


class Batch(NamedTuple):
    images: Tensor
    """Normalised images [B, C, H, W]."""
    labels: Tensor
    """Class index of each image, int64 [B]; -1 for images without a label."""
    unreadable: list[Unreadable]
    """Images that could not be read. Other images took their places in the batch."""


@dataclass(frozen=True)
class TrainingImages:
    samples: Dataset[Sample]
    """Dataset of (augmented image, label) by index."""
    count: int
    labelled: bool
    description: str
    """Text about the images for logs and records."""
    num_classes: int | None = None
    """Number of classes of the model, with which labels are checked; None without labels."""

    def divided(self, count: int, preprocessing: Preprocessing, seed: int) -> tuple[TrainingImages, ...]:
        """Return the training images, and ``count`` images held out from them without augmentation.

        Held out are the last images in the random order of epoch 0.
        """
        order = StepBatches(self.count, batch_size=self.count, parts=1, seed=seed).of_step(0)[1]
        plain: Any = copy.copy(self.samples)
        plain.transform = preprocessing.transform()
        text, left = f"{self.description}, {count} of them held out", self.count - count
        remaining = replace(self, samples=Subset(self.samples, order[:left]), count=left, description=text)
        return remaining, replace(self, samples=Subset(plain, order[left:]), count=count)


def training_images(
    data: DataOptions,
    preprocessing: Preprocessing,
    augmentation: AugmentationOptions,
    *,
    num_classes: int,
    use_labels: bool,
    need_labels: bool,
) -> TrainingImages:
    transform = training_transform(preprocessing, augmentation)
    use_labels = use_labels and num_classes > 1
    if data.dataset is None and data.data_dir is None:
        raise UsageError(f"no training images: give {option_name('data_dir')} or {option_name('dataset')}")
    split = open_split(
        data,
        "train_split",
        preprocessing,
        num_classes=num_classes or None,
        use_labels=use_labels,
        transform=transform,
    )
    if split.images is None:
        raise DataError(
            f"images {split.name}: a stream cannot be resumed at a step; unpack its shards into 1 folder per "
            f"class ({option_name('data_dir')}), or use hfds/"
        )
    if need_labels and data.dataset is None and not split.labelled:
        raise DataError(
            f"images {split.name}: no class folders, so no labels; "
            f"give a {option_name('teacher')}, or arrange the files as <class>/<image>"
        )
    count = len(split.groups)
    return TrainingImages(
        samples=split.images,
        count=count,
        labelled=split.labelled,
        description=f"{count} images {split.name} ({split.label_note})",
        num_classes=num_classes if split.labelled else None,
    )


def training_transform(preprocessing: Preprocessing, options: AugmentationOptions) -> Transform:
    # Without augmentation, training uses the transform of the evaluation.
    plain = preprocessing.transform()
    if not options.aug:
        return plain
    try:
        transform: Transform = create_transform(
            input_size=preprocessing.input_size,
            is_training=True,
            scale=options.scale,
            ratio=options.ratio,
            hflip=options.hflip,
            vflip=options.vflip,
            color_jitter=options.color_jitter or None,
            auto_augment=options.aa,
            interpolation=options.train_interpolation or preprocessing.interpolation,
            mean=preprocessing.mean,
            std=preprocessing.std,
            re_prob=options.reprob,
            re_mode=options.remode,
            re_count=options.recount,
        )
    except (AssertionError, KeyError, ValueError) as error:
        values = {"aa": options.aa, "train_interpolation": options.train_interpolation}
        asked = ", ".join(option_name(name, value) for name, value in values.items() if value is not None)
        raise UsageError(f"{asked}: not supported by timm: {error}") from None
    return transform


def mixed_seed(*numbers: int) -> int:
    """Return a seed in 0..2**63 - 1 that depends on all numbers and their order.

    >>> mixed_seed(42, 0, 1) == mixed_seed(42, 0, 1), mixed_seed(42, 0, 1) == mixed_seed(42, 1, 0)
    (True, False)
    """
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


class _Seeded(Dataset[Drawn]):
    """Dataset indexed by (epoch, image index), which also seed the augmentation.

    The next readable image replaces an unreadable image.
    """

    def __init__(self, samples: Dataset[Sample], count: int, seed: int) -> None:
        self.samples, self.count, self.seed = samples, count, seed

    def __getitem__(self, key: tuple[int, int]) -> Drawn:
        epoch, index = key
        unreadable: list[Unreadable] = []
        for attempt in range(min(_MAX_TRIES, self.count)):
            at = (index + attempt) % self.count
            # timm's transforms draw from all three generators, which belong to whichever process reads.
            seed_everything(mixed_seed(self.seed, epoch, at))
            image, label = self.samples[at]
            if not isinstance(image, Unreadable):
                return image, label, unreadable
            unreadable.append(image)
        return None, -1, unreadable


class StepBatches:
    """Images of each training step: in each epoch, a random order is cut into global batches.

    A global batch is split into parts, one per forward pass of a process. timm's mixup pairs image i with
    image i from the end of a batch, so a part of even size takes images from both ends, and the pairs do not
    depend on the number of parts. The last incomplete batch of an epoch is dropped.
    """

    def __init__(self, count: int, *, batch_size: int, parts: int, seed: int) -> None:
        self.count, self.batch_size, self.parts, self.seed = count, batch_size, parts, seed
        self.steps_per_epoch = count // (batch_size * parts)
        if self.steps_per_epoch == 0:
            smaller = [option_name("batch_size")] + [option_name("grad_accum_steps")] * (parts > 1)
            raise DataError(
                f"{count} training images, but a step takes {batch_size * parts}; use a smaller "
                f"{' or '.join(smaller)}"
            )

    def of_step(self, step: int) -> tuple[int, list[int]]:
        """Return the epoch of ``step``, and the image indices in the step's global batch."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator)
        size = self.batch_size * self.parts
        return epoch, self._order[within * size : (within + 1) * size].tolist()

    def part(self, step: int, number: int) -> list[tuple[int, int]]:
        """Return (epoch, image index) of each image in part ``number`` of ``step``.

        >>> batches = StepBatches(8, batch_size=4, parts=2, seed=0)
        >>> batches.part(step=0, number=1) == [(0, index) for index in batches.of_step(0)[1][2:6]]
        True
        """
        epoch, batch = self.of_step(step)
        # Parts of even size mirror each other around the middle of the batch, as mixup's pairs do; a middle
        # image would be its own partner, so that odd parts are cut one after the other and are not mixed.
        if self.batch_size % 2:
            chosen = batch[number * self.batch_size : (number + 1) * self.batch_size]
        else:
            half, end = self.batch_size // 2, len(batch) - number * self.batch_size // 2
            chosen = batch[number * half : (number + 1) * half] + batch[end - half : end]
        return [(epoch, index) for index in chosen]


def training_loader(
    images: TrainingImages,
    batches: StepBatches,
    *,
    start: int,
    stop: int,
    mine: Sequence[int],
    workers: int,
    pin_memory: bool,
) -> Generator[Batch, None, None]:
    """Yield the batches of steps ``start`` to ``stop`` - 1: of each step, the parts numbered in ``mine``."""
    loader: DataLoader[Any] = DataLoader(
        _Seeded(images.samples, images.count, batches.seed),
        batch_sampler=(batches.part(step, number) for step in range(start, stop) for number in mine),
        num_workers=workers,
        collate_fn=_stack,
        pin_memory=pin_memory,
    )
    for batch in iter(loader):
        if len(batch.images) < len(batch.labels):
            first, count = batch.unreadable[0], len(batch.unreadable)
            raise DataError(
                f"{count} images of a batch cannot be read, first {first.file}: {first.reason}. "
                "Repair or remove the files"
            )
        if images.num_classes is not None:
            check_labels(batch.labels, images.num_classes, images.description)
        yield batch


def _stack(drawn: Sequence[Drawn]) -> Batch:
    readable = [image for image, _, _ in drawn if image is not None]
    labels = torch.tensor([label for _, label, _ in drawn], dtype=torch.int64)
    unreadable = [bad for _, _, several in drawn for bad in several]
    return Batch(torch.stack(readable) if readable else torch.empty(0), labels, unreadable)
