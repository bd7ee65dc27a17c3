"""Datasets that timm knows by name: ``hfds/NAME``, ``wds/NAME``, ``tfds/NAME``, ``torch/NAME``."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset, IterableDataset

from mhacut.data.folders import read_class_map
from mhacut.data.preprocessing import Preprocessing, Transform
from mhacut.data.reading import (
    UNREADABLE,
    Sample,
    Unreadable,
    open_image,
    reason_of,
    run_no_programs,
    with_channels,
)
from mhacut.data.shards import by_index
from mhacut.errors import DataError, UsageError, option_name
from mhacut.options.base import LabelledImages
from mhacut.runtime.files import is_no_file

_EXTRAS = {
    "hfds": ("datasets", "mhacut[hfds]"),
    "hfids": ("datasets", "mhacut[hfds]"),
    "wds": ("webdataset", "mhacut[wds]"),
    "tfds": ("tensorflow_datasets", "tensorflow-datasets"),
}
"""Per prefix of a dataset name: the module it needs, and what to install for it."""


class NamedImages(Dataset[Sample]):
    """Images of a dataset of timm's or torchvision's by index; unreadable ones are reported, not replaced."""

    def __init__(
        self,
        name: str,
        opened: Any,
        indices: Sequence[int],
        preprocessing: Preprocessing,
        transform: Transform | None = None,
    ) -> None:
        """Take some images of a dataset.

        Args:
            name: of the dataset, for messages.
            opened: the dataset.
            indices: which images.
            preprocessing: of the model.
            transform: used in place of the one for evaluation.
        """
        self.name, self.opened, self.indices = name, opened, indices
        self._channels = preprocessing.input_size[0]
        self._transform = transform or preprocessing.transform()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        position = self.indices[index]
        reader = getattr(self.opened, "reader", None)
        target: Any = -1
        run_no_programs()  # torchvision's datasets open images themselves
        try:
            # Past timm's ImageDataset, which puts the next image in place of one it cannot read.
            source, target = (self.opened if reader is None else reader)[position]
            if isinstance(source, Image.Image):
                picture = with_channels(source, self._channels)
            else:
                picture = open_image(source, self._channels)
        except UNREADABLE as error:
            return Unreadable(f"{self.name}[{position}]", reason_of(error)), -1
        return self._transform(picture), -1 if target is None else int(target)


class NamedStream(IterableDataset[Sample]):
    """Images of a dataset of timm's that can only be read from its beginning."""

    def __init__(self, name: str, opened: Any, limit: int | None, preprocessing: Preprocessing) -> None:
        self.name, self.opened, self.limit = name, opened, limit
        self._channels, self._transform = preprocessing.input_size[0], preprocessing.transform()

    def __iter__(self) -> Iterator[Sample]:
        run_no_programs()  # timm opens the images of a stream
        for number, (picture, target) in enumerate(_with_labels(self.name, self.opened)):
            if self.limit is not None and number == self.limit:
                return
            label = -1 if target is None else int(target)
            try:
                picture = with_channels(picture, self._channels)
            except ValueError as error:
                yield Unreadable(f"{self.name}[{number}]", str(error)), label
            else:
                yield self._transform(picture), label


def open_named(
    data: LabelledImages,
    split: str,
    num_classes: int | None,
    *,
    seed: int | None = None,
    check_classes: bool,
) -> Any:
    """Open the dataset that timm knows by the name ``data.dataset``.

    Tar files on this machine are no stream: see :mod:`mhacut.data.shards`.

    Args:
        data: name of the dataset, where it keeps its files, and names of the classes.
        split: of the dataset.
        num_classes: of the model's head.
        seed: of the order in which a stream is shuffled; None leaves the order.
        check_classes: refuse a dataset with other classes than ``num_classes``.

    Raises:
        DataError: an extra is missing, it cannot be opened, or its classes are not the head's.
        UsageError: timm knows no such name, or ``data.class_map`` cannot be used with it.
    """
    run_no_programs()
    name = str(data.dataset)
    kind, asked = _kind(name), option_name("dataset", name)
    mapped = None if data.class_map is None else read_class_map(data.class_map, num_classes)
    if kind == "torch" and mapped is not None:
        raise UsageError(f"{asked}: torchvision's datasets take no {option_name('class_map')}")
    # Joined to "", a shard "pipe:COMMAND" of _info.json would stay one, and webdataset would run it.
    root = None if data.data_dir is None else os.fspath(data.data_dir) or os.curdir
    for info in ("_info.json", "info.json"):
        if kind == "wds" and root is not None and is_no_file(os.path.join(root, info)):
            raise DataError(f"{os.path.join(root, info)}: is not a regular file")
    streamed: dict[str, Any] = {}
    if kind not in ("torch", "hfds"):  # seeds of NumPy and TensorFlow, which are never negative
        streamed = {"seed": (seed or 0) % 2**32, "is_training": seed is not None}
    try:
        opened = create_dataset(name, root=root, split=split, class_map=mapped, **streamed)
    # Third parties' loaders raise anything, from a refused connection to an assertion.
    except Exception as error:
        raise DataError(
            f"{asked}, split {split!r}: cannot be opened: {type(error).__name__}: {error} "
            f"(splits are chosen with {option_name('train_split')} and {option_name('val_split')})"
        ) from error
    known = _class_count(opened)
    if check_classes and mapped is None and num_classes is not None and known not in (None, num_classes):
        raise DataError(
            f"{asked}: {known} classes, the model's head has {num_classes}. "
            f"Name the classes in the head's order with {option_name('class_map')}"
        )
    return (by_index(opened, split) or opened) if kind == "wds" else opened


def _kind(name: str) -> str:
    """Prefix of a dataset's name.

    Raises:
        UsageError: no such prefix.
        DataError: the package that it needs is missing.
    """
    asked = option_name("dataset", name)
    prefix, slash, rest = name.partition("/")
    prefix = prefix.lower()
    if not (slash and rest) or prefix not in (*_EXTRAS, "torch"):
        raise UsageError(
            f"{asked}: expected hfds/NAME, hfids/NAME, wds/NAME, tfds/NAME or torch/NAME; "
            f"for a folder use {option_name('data_dir')}"
        )
    module, package = _EXTRAS.get(prefix, ("torchvision", "torchvision"))
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


def _class_count(opened: Any) -> int | None:
    classes = getattr(opened, "classes", None) or getattr(
        getattr(opened, "reader", None), "class_to_idx", None
    )
    return len(classes) if classes else None


def targets_of(name: str, opened: Any) -> list[object]:
    """Return a label per image where labels are known without reading images; else 0 for all.

    Raises:
        DataError: the labels of the dataset ``name`` cannot be read.
    """
    reader: Any = getattr(opened, "reader", None)
    if hasattr(reader, "iter_targets"):
        return list(_with_labels(name, reader.iter_targets()))
    targets = getattr(opened, "targets", None)
    if targets is not None and len(targets) == len(opened):
        return [int(target) for target in targets]
    return [0] * len(opened)
