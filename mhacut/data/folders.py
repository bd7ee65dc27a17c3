"""Folders of images, listed and checked before an image is opened.

timm's folder reader hides missing data: a missing split becomes the whole root folder, and an empty class
folder shifts the labels of later classes. So mhacut lists folders itself, in timm's class order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from timm.utils import natural_key

from mhacut.errors import DataError, option_name
from mhacut.options.base import LabelledImages, PathLike
from mhacut.runtime.files import check_class_map, check_data_dir
from mhacut.text import listed

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
"""Suffixes of file names that are read as images, in lower case."""
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation"),
}
"""Folder names of the splits train and val, the preferred name first."""


@dataclass(frozen=True)
class Folder:
    """Paths and classes of the images of a split, from folder names. The images are not opened."""

    path: Path
    images: tuple[str, ...]
    """Image paths relative to ``path``, with forward slashes, sorted."""
    names: tuple[str, ...]
    """Class folder of each image; an empty text for images outside class folders."""
    classes: tuple[str, ...]
    """All class folders, also empty ones, in timm's order (2 before 10)."""

    @property
    def name(self) -> str:
        return os.path.basename(os.path.abspath(self.path))

    @property
    def empty(self) -> tuple[str, ...]:
        held = set(self.names)
        return tuple(name for name in self.classes if name not in held)


def has_split(data: LabelledImages, split: str) -> bool:
    if data.dataset is not None:
        return True
    return data.data_dir is not None and split_folder(Path(data.data_dir), split) is not None


def split_folder(root: Path, split: str) -> Path | None:
    synonyms = next((names for names in SPLIT_NAMES.values() if split in names), ())
    for name in (split, *synonyms):
        if os.path.isdir(root / name):
            return root / name
    return None


def subfolders(root: Path) -> list[str]:
    """Return the names of the visible folders in ``root``, in timm's class order (2 before 10)."""
    names = [entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    # The name itself breaks ties between "a" and "A".
    return sorted(names, key=lambda name: (natural_key(name), name))


def find_folder(data_dir: PathLike, split: str, option: str) -> Path:
    """Return the folder of ``split``; without split folders, ``data_dir`` itself for train and val."""
    root = Path(data_dir)
    check_data_dir(root)
    folder = split_folder(root, split)
    if folder is not None:
        return folder
    folders, known = subfolders(root), {"test", "testing"}.union(*SPLIT_NAMES.values())
    # A split that the user named must not be replaced by other images.
    if split not in SPLIT_NAMES or known.intersection(folders):
        raise DataError(
            f"{root}: no split {split!r}; folders there: {listed(folders)}. Choose one with "
            f"{option_name(option)}"
        )
    return root


def scan(folder: Path) -> Folder:
    """List the images under ``folder``. The first folder of a path is the class. Hidden files are skipped."""
    classes = subfolders(folder)
    files = [(entry.name, "") for entry in folder.iterdir() if _is_image(entry.name) and entry.is_file()]
    files += [
        (path.relative_to(folder).as_posix(), name) for name in classes for path in _images(folder / name)
    ]
    # Sorted, so that random choices do not depend on the file system.
    files.sort()
    return Folder(folder, tuple(file for file, _ in files), tuple(name for _, name in files), tuple(classes))


def _is_image(file: str) -> bool:
    return not file.startswith(".") and os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES


def _images(start: Path) -> Iterator[Path]:
    seen = set[str]()  # stops at circular links
    for path, folders, files in os.walk(start, followlinks=True):
        place = os.path.realpath(path)
        folders[:] = [] if place in seen else sorted(name for name in folders if not name.startswith("."))
        if place not in seen:
            seen.add(place)
            yield from (Path(path, file) for file in files if _is_image(file))


def read_class_map(file: PathLike, num_classes: int | None) -> dict[str, int]:
    """Return {class name: class index}. The file has a class name per line, in the classifier's order."""
    path = Path(file)
    check_class_map(path)
    try:
        # utf-8-sig: editors on Windows write a byte order mark.
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: class map cannot be read: {error} ({option_name('class_map')})") from None
    while lines and not lines[-1].strip():
        lines.pop()
    names = [line.strip() for line in lines]
    if num_classes is not None and len(set(names)) != num_classes:
        raise DataError(
            f"{path}: class map names {len(set(names))} classes, the model's head has {num_classes}; "
            f"expected one class a line in the head's order ({option_name('class_map')})"
        )
    return {name: index for index, name in enumerate(names)}


def _below_single_folders(path: Path) -> Path:
    while len(inner := subfolders(path)) == 1 and not any(map(_is_image, os.listdir(path / inner[0]))):
        path /= inner[0]
    return path


def label_images(
    folder: Folder, data: LabelledImages, num_classes: int | None, hint: str, *, other: str | None
) -> list[int]:
    class_map = data.class_map
    if "" in folder.names:
        stray = folder.images[folder.names.index("")]
        raise DataError(
            f"{folder.path}: {stray} lies next to the class folders {listed(folder.classes)}; "
            f"expected every image in the folder of its class{hint}"
        )
    if class_map is not None:
        index = read_class_map(class_map, num_classes)
        # Class names without a folder are allowed: data sets often have a subset of ImageNet's classes.
        unknown = [name for name in folder.classes if name not in index and name not in folder.empty]
        if unknown:
            raise DataError(
                f"{folder.path}: class folders not in {class_map}: {listed(unknown)}. Add them to the file "
                f"({option_name('class_map')})"
            )
        return [index[name] for name in folder.names]
    # Without a map, the label is the index of the sorted class folder, as in training with timm.
    if folder.empty:
        raise DataError(
            f"{folder.path}: class folders without images: {listed(folder.empty)}. Fill them, or name the "
            f"classes in the head's order with {option_name('class_map')}"
        )
    if num_classes is not None and len(folder.classes) != num_classes:
        inner = _below_single_folders(folder.path)
        cure = f"Name the classes in the head's order with {option_name('class_map')}{hint}"
        if inner != folder.path:
            cure = f"The folder may be too high: try {option_name('data_dir', os.fspath(inner))}"
        raise DataError(
            f"{folder.path}: {len(folder.classes)} class folders ({listed(folder.classes)}), "
            f"the model's head has {num_classes} classes. {cure}"
        )
    second = None if other is None or data.data_dir is None else split_folder(Path(data.data_dir), other)
    theirs = [] if second is None else subfolders(second)
    here = [name for name in folder.classes if name not in theirs]
    there = [name for name in theirs if name not in folder.classes]
    # One renamed folder silently shifts labels. If all names differ, the order may still be the same.
    if len(here) == len(there) and 0 < len(here) < len(theirs):
        raise DataError(
            f"{folder.path}: class folders are not those of {second}: {listed(here)} only here, "
            f"{listed(there)} only there. Labels follow the sorted names: use the same folders in both{hint}"
        )
    index = {name: number for number, name in enumerate(folder.classes)}
    return [index[name] for name in folder.names]
