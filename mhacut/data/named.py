"""Datasets that timm knows by name: ``hfds/NAME``, ``wds/NAME``, ``tfds/NAME``, ``torch/NAME``."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset

from mhacut.data.folders import read_class_map
from mhacut.data.preprocessing import Preprocessing, Transform
from mhacut.data.reading import Sample, Unreadable, open_image, reason_of, with_channels
from mhacut.errors import DataError, UsageError, option_name
from mhacut.options.base import LabelledImages

_EXTRAS = {
    "hfds": ("datasets", "mhacut[hfds]"),
    "hfids": ("datasets", "mhacut[hfds]"),
    "wds": ("webdataset", "mhacut[wds]"),
    "tfds": ("tensorflow_datasets", "tensorflow-datasets"),
    "torch": ("torchvision", "torchvision"),
}
"""Module that each prefix of a dataset's name needs, and what to install for it."""


class NamedImages(Dataset[Sample]):
    """Images of a dataset of timm's or torchvision's by index; unreadable ones are reported, not replaced."""

    def __init__(
        self,
        name: str,
        opened: Any,
        preprocessing: Preprocessing,
        transform: Transform | None = None,
    ) -> None:
        """Take a dataset.

        Args:
            name: name of the dataset, for messages.
            opened: dataset of timm's or torchvision's.
            preprocessing: preprocessing of the model.
            transform: transform in place of the one for evaluation.
        """
        self.name, self.opened = name, opened
        self._channels = preprocessing.input_size[0]
        self._transform = transform or preprocessing.transform()

    def __getitem__(self, index: int) -> Sample:
        reader = getattr(self.opened, "reader", None)
        try:
            # Past timm's ImageDataset, which puts the next image in place of one it cannot read.
            source, target = (self.opened if reader is None else reader)[index]
            if isinstance(source, Image.Image):
                picture = with_channels(source, self._channels)
            else:
                picture = open_image(source, self._channels)
        except Exception as error:
            return Unreadable(f"{self.name}[{index}]", reason_of(error)), -1
        return self._transform(picture), -1 if target is None else int(target)


class NamedStream(IterableDataset[Sample]):
    """Images of a dataset of timm's that can only be read from its beginning."""

    def __init__(self, name: str, opened: Any, limit: int | None, preprocessing: Preprocessing) -> None:
        self.name, self.opened, self.limit = name, opened, limit
        self._channels, self._transform = preprocessing.input_size[0], preprocessing.transform()

    def __iter__(self) -> Iterator[Sample]:
        for number, (picture, target) in enumerate(_with_labels(self.name, self.opened)):
            if self.limit is not None and number == self.limit:
                return
            label = -1 if target is None else int(target)
            yield self._transform(with_channels(picture, self._channels)), label


def open_named(
    data: LabelledImages,
    split: str,
    num_classes: int | None,
    *,
    seed: int | None = None,
    check_classes: bool,
) -> Any:
    """Open the dataset that timm knows by the name ``data.dataset``.

    Tar files on this machine are no stream: see :class:`ShardedSamples`.

    Args:
        data: options with the name of the dataset, where it keeps its files, and names of the classes.
        split: name of the split.
        num_classes: number of classes of the model's head.
        seed: seed of the order in which a stream is shuffled; None leaves the order.
        check_classes: whether to refuse a dataset with other classes than ``num_classes``.

    Raises:
        DataError: an extra is missing, it cannot be opened, or its classes are not the head's.
        UsageError: timm knows no such name, or ``data.class_map`` cannot be used with it.
    """
    name = str(data.dataset)
    kind, asked = _kind(name), option_name("dataset", name)
    mapped = None if data.class_map is None else read_class_map(data.class_map, num_classes)
    if kind == "torch" and mapped is not None:
        raise UsageError(f"{asked}: torchvision's datasets take no {option_name('class_map')}")
    # Joined to "", a shard "pipe:COMMAND" of _info.json would stay one, and webdataset would run it.
    root = None if data.data_dir is None else os.fspath(data.data_dir) or os.curdir
    streamed: dict[str, Any] = {}
    if kind not in ("torch", "hfds"):  # seeds of NumPy and TensorFlow, which are never negative
        streamed = {"seed": (seed or 0) % 2**32, "is_training": seed is not None}
    try:
        opened = create_dataset(name, root=root, split=split, class_map=mapped, **streamed)
        samples = _by_index(opened) if kind == "wds" else None
    except DataError:
        raise
    # Third parties' loaders raise anything, from a refused connection to an assertion.
    except Exception as error:
        raise DataError(
            f"{asked}, split {split!r}: cannot be opened: {type(error).__name__}: {error} "
            f"(splits are chosen with {option_name('train_split')} and {option_name('val_split')})"
        ) from error
    reader = getattr(opened, "reader", None)
    known = getattr(opened, "classes", None) or getattr(reader, "class_to_idx", None)
    if check_classes and mapped is None and num_classes is not None and known and len(known) != num_classes:
        raise DataError(
            f"{asked}: {len(known)} classes, the model's head has {num_classes}. "
            f"Name the classes in the head's order with {option_name('class_map')}"
        )
    return opened if samples is None else samples


def _kind(name: str) -> str:
    """Return the prefix of a dataset's name.

    Raises:
        UsageError: no such prefix.
        DataError: the package that it needs is missing.
    """
    asked = option_name("dataset", name)
    prefix, slash, rest = name.partition("/")
    prefix = prefix.lower()
    if not (slash and rest) or prefix not in _EXTRAS:
        raise UsageError(
            f"{asked}: expected hfds/NAME, hfids/NAME, wds/NAME, tfds/NAME or torch/NAME; "
            f"for a folder use {option_name('data_dir')}"
        )
    module, package = _EXTRAS[prefix]
    if importlib.util.find_spec(module) is None:
        raise DataError(f"{asked}: needs the package {module}; pip install '{package}'")
    return prefix


def _with_labels(name: str, items: Iterable[Any]) -> Iterator[Any]:
    """Give the items of a reader of timm's, which looks labels up as it goes."""
    try:
        yield from items
    except KeyError as error:
        raise DataError(
            f"{option_name('dataset', name)}: its labels cannot be read: there is no {error!s:.80}; "
            f"expected a column 'label', and with {option_name('class_map')} a line for every class"
        ) from error


def targets_of(name: str, opened: Any) -> list[object]:
    """Return a label per image where labels are known without reading images; else 0 for all.

    Raises:
        DataError: the labels of the dataset ``name`` cannot be read.
    """
    reader: Any = getattr(opened, "reader", None)
    # Asking for each label by index would decode each image.
    if hasattr(reader, "iter_targets"):
        return list(_with_labels(name, reader.iter_targets()))
    targets = getattr(opened, "targets", None)
    if targets is not None and len(targets) == len(opened):
        return [int(target) for target in targets]
    return [0] * len(opened)


# -- tar files of samples --

_MEMBER = re.compile(r"((?:.*/)?[^./][^.]*)\.([^/]*)")
"""A sample's key, and the part of the sample in the member, as webdataset splits names."""


class ShardedSamples(Dataset[tuple[io.BytesIO, int]]):
    """Encoded image and label of every sample in tar files that webdataset wrote, read by index.

    timm streams these, and a stream can neither be shuffled as a whole, nor resumed at a step, nor shared
    among processes image by image. Files on a disk can: their members are found once, by headers.
    """

    def __init__(self, shards: list[Path], image_endings: tuple[str, ...], label_field: str) -> None:
        """Index ``shards``; reads headers and labels, no images.

        Args:
            shards: uncompressed tar files.
            image_endings: endings of members that are images, the likeliest first.
            label_field: field of the member ``json`` with the label; empty for the member ``cls``.

        Raises:
            DataError: a file is no tar file, or a label no number.
        """
        self.shards = shards
        self.targets: list[int] = []
        """Labels; -1 where a sample has none."""
        self.left_out = 0
        """Number of samples whose json marks them as unlabelled."""
        self._places = array("q")  # shard, offset, size of every image: millions of them fit
        for number, shard in enumerate(shards):
            try:
                with tarfile.open(shard, "r:") as tar:
                    for key, members in _samples(tar):
                        image = next((members[end] for end in image_endings if end in members), None)
                        if image is not None:
                            label = _label(tar, members, key, label_field)
                            self._add(number, image, label, label_field)
            except (tarfile.TarError, OSError, ValueError, KeyError, TypeError, OverflowError) as error:
                raise DataError(f"{shard}: cannot be read as a tar file of samples: {error}") from error

    def _add(self, number: int, image: tarfile.TarInfo, label: int, field: str) -> None:
        if label < 0 and field:  # timm's mark of unlabelled samples, which it leaves out too
            self.left_out += 1
            return
        self._places.extend((number, image.offset_data, image.size))
        self.targets.append(label)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        number, offset, size = self._places[3 * index : 3 * index + 3]
        with open(self.shards[number], "rb") as shard:
            shard.seek(offset)
            return io.BytesIO(shard.read(size)), self.targets[index]


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yield the key of each sample, and its members by ending; they stand side by side."""
    key, members = "", dict[str, tarfile.TarInfo]()
    for member in tar:
        parts = _MEMBER.fullmatch(member.name) if member.isfile() else None
        if parts is not None:
            if parts[1] != key:
                yield key, members
                key, members = parts[1], {}
            members[parts[2].lower()] = member
    yield key, members


def _label(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], key: str, field: str) -> int:
    """Return the label of a sample; -1 for one without.

    Raises:
        ValueError: it is no number.
    """
    # Labels are read now, images later: a split is balanced by class before any image is opened.
    held = tar.extractfile(members["json" if field else "cls"]) if field or "cls" in members else None
    text = b"" if held is None else held.read()
    if not text:
        return -1
    try:
        return int(json.loads(text)[field] if field else text)
    except (ValueError, KeyError, TypeError):
        where = f"{field!r} of its json" if field else "its cls"
        raise ValueError(f"sample {key}: {where} is no label, found {text[:40]!r}") from None


def _by_index(opened: Any) -> ShardedSamples | None:
    """Return the samples of timm's stream ``opened``; None where they cannot be indexed.

    That is the case if the shards are no plain tar files on this machine, or the labels no single number.

    Raises:
        DataError: a shard is damaged, or shards are missing.
    """
    reader: Any = getattr(opened, "reader", None)
    split: Any = getattr(reader, "split_info", None)
    shards = [Path(reader.root or "") / name for name in getattr(split, "filenames", None) or ()]
    # In compressed shards no place can be jumped to.
    plain = all(shard.suffix == ".tar" and shard.is_file() for shard in shards)
    if not shards or not plain or reader.remap_class or getattr(reader, "target_keys", None):
        return None
    endings = tuple(str(reader.input_key).lower().split(";"))
    samples = ShardedSamples(shards, endings, reader.target_key or split.alt_label)
    # tarfile takes a damaged header for the end of the file: samples would be missing without a word.
    announced, indexed = int(split.num_samples or 0), len(samples) + samples.left_out
    if announced and announced != indexed:
        raise DataError(
            f"{shards[0].parent}: {indexed} samples in {len(shards)} shards, {announced} announced; one is "
            "truncated or damaged, or _info.json belongs to other shards"
        )
    return samples
