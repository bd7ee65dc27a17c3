"""Datasets that timm opens by name: ``hfds/NAME``, ``wds/NAME``, ``tfds/NAME``, ``torch/NAME``."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from typing import Any

from timm.data import create_dataset
from torch.utils.data import IterableDataset

from mhacut.data.folders import read_class_map
from mhacut.data.preprocessing import Preprocessing
from mhacut.data.reading import Sample, open_image
from mhacut.errors import DataError, UsageError, option_name
from mhacut.options.base import LabelledImages

_EXTRAS = {
    "hfds": ("datasets", "mhacut[hfds]"),
    "hfids": ("datasets", "mhacut[hfds]"),
    "wds": ("webdataset", "mhacut[wds]"),
    "tfds": ("tensorflow_datasets", "tensorflow-datasets"),
    "torch": ("torchvision", "torchvision"),
}
"""Required module and pip package for the prefix of a dataset's name."""


class NamedStream(IterableDataset[Sample]):
    """Images and labels of a named dataset without random access, in the dataset's order."""

    def __init__(self, name: str, opened: Any, limit: int | None, preprocessing: Preprocessing) -> None:
        self.name, self.opened, self.limit = name, opened, limit
        self._channels, self.transform = preprocessing.input_size[0], preprocessing.transform()

    def __iter__(self) -> Iterator[Sample]:
        for number, (picture, target) in enumerate(_with_labels(self.name, self.opened)):
            if self.limit is not None and number == self.limit:
                return
            label = -1 if target is None else int(target)
            yield self.transform(open_image(picture, self._channels)), label


def open_named(
    data: LabelledImages,
    split: str,
    num_classes: int | None,
    *,
    seed: int | None = None,
    check_classes: bool,
) -> Any:
    name = str(data.dataset)
    kind, option = _kind(name), option_name("dataset", name)
    mapped = None if data.class_map is None else read_class_map(data.class_map, num_classes)
    if kind == "torch" and mapped is not None:
        raise UsageError(f"{option}: torchvision's datasets do not support {option_name('class_map')}")
    # Security: with root "", a shard "pipe:COMMAND" in _info.json would be run by webdataset.
    root = None if data.data_dir is None else os.fspath(data.data_dir) or os.curdir
    streamed: dict[str, Any] = {}
    if kind not in ("torch", "hfds"):  # seeds of NumPy and TensorFlow, which are never negative
        streamed = {"seed": (seed or 0) % 2**32, "is_training": seed is not None}
    try:
        opened = create_dataset(name, root=root, split=split, class_map=mapped, **streamed)
    except Exception as error:
        raise DataError(
            f"{option}, split {split!r}: cannot be opened: {type(error).__name__}: {error} "
            f"(splits are chosen with {option_name('train_split')} and {option_name('val_split')})"
        ) from error
    reader = getattr(opened, "reader", None)
    known = getattr(opened, "classes", None) or getattr(reader, "class_to_idx", None)
    if check_classes and mapped is None and num_classes is not None and known and len(known) != num_classes:
        raise DataError(
            f"{option}: {len(known)} classes, the model's head has {num_classes}. "
            f"Name the classes in the head's order with {option_name('class_map')}"
        )
    return opened


def _kind(name: str) -> str:
    option = option_name("dataset", name)
    prefix, slash, rest = name.partition("/")
    prefix = prefix.lower()
    if not (slash and rest) or prefix not in _EXTRAS:
        raise UsageError(
            f"{option}: expected hfds/NAME, hfids/NAME, wds/NAME, tfds/NAME or torch/NAME; "
            f"for a folder use {option_name('data_dir')}"
        )
    module, package = _EXTRAS[prefix]
    if importlib.util.find_spec(module) is None:
        raise DataError(f"{option}: needs {module}: pip install '{package}'")
    return prefix


def _with_labels(name: str, items: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from items
    except KeyError as error:
        raise DataError(
            f"{option_name('dataset', name)}: its labels cannot be read: there is no {error!s:.80}; "
            f"expected a column 'label', and with {option_name('class_map')} a line for every class"
        ) from error


def targets_of(name: str, opened: Any) -> list[object]:
    """Return the label of each image; zeros if reading labels would decode the images."""
    reader: Any = getattr(opened, "reader", None)
    # Labels by index would decode every image.
    if hasattr(reader, "iter_targets"):
        return list(_with_labels(name, reader.iter_targets()))
    targets = getattr(opened, "targets", None)
    if targets is not None and len(targets) == len(opened):
        return [int(target) for target in targets]
    return [0] * len(opened)
