"""Folders of images, listed and checked before any image is opened.

timm's own folder reader hides missing data: a missing split silently becomes the whole root, and an empty
class folder vanishes and shifts the classes after it. So folders are scanned here, classes in timm's order.
"""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mhacut.errors import DataError, option_name
from mhacut.options.base import LabelledImages, PathLike
from mhacut.runtime.files import check_class_map, check_data_dir, stays_inside

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
"""Files that count as images, in lower case."""
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation"),
}
"""Folder names tried for a split, in this order; any other split has only its own name."""
_LISTED = 10


@dataclass(frozen=True)
class Folder:
    """Images of one split, listed but not opened."""

    path: Path
    images: tuple[str, ...]
    """Paths relative to ``path``, with forward slashes, sorted."""
    names: tuple[str, ...]
    """Class folder of each image; empty text for images that lie in no class folder."""
    classes: tuple[str, ...]
    """Class folders in timm's order (2 before 10), empty ones included."""

    @property
    def name(self) -> str:
        """Name of the folder itself, also where the path is ``.``."""
        return os.path.basename(os.path.abspath(self.path))

    @property
    def empty(self) -> tuple[str, ...]:
        """Class folders without an image."""
        held = set(self.names)
        return tuple(name for name in self.classes if name not in held)


def has_split(data: LabelledImages, split: str) -> bool:
    """Whether ``split`` can be read: there is a folder of that name, or a named dataset."""
    if data.dataset is not None:
        return True
    return data.data_dir is not None and split_folder(Path(data.data_dir), split) is not None


def split_folder(root: Path, split: str) -> Path | None:
    """Return the folder of a split, under its name or an alias of it."""
    synonyms = next((names for names in SPLIT_NAMES.values() if split in names), ())
    for name in (split, *synonyms):
        with suppress(OSError):  # of a name that is too long
            if (root / name).is_dir():
                return root / name
    return None


def _is_split_name(name: str) -> bool:
    return name in ("test", "testing") or any(name in names for names in SPLIT_NAMES.values())


def subfolders(root: Path) -> list[str]:
    """Names of the visible folders in ``root``, in timm's order of classes."""
    try:
        names = [entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:  # removed meanwhile
        raise DataError(f"{root}: cannot be read: {error.strerror}") from None
    # The name itself last, or the file system would have the order of "a" and "A".
    return sorted(names, key=lambda name: (_natural(name), name))


def _natural(name: str) -> list[int | str]:
    """Return timm's ``natural_key``, by which 2 is before 10; of names such as "x\u00b2", that one fails."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def listed(names: Sequence[str]) -> str:
    """Return the first names as text, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(names[:_LISTED]) + more) or "none"


def find_folder(data_dir: PathLike, split: str, option: str) -> Path:
    """Return the folder to read for ``split``: its own, or ``data_dir`` itself if that holds no splits.

    ``data_dir`` itself serves only for ``train`` and ``val``, which are the defaults: any other split was
    asked for by name, and must not be replaced by other images.

    Args:
        data_dir: folder with splits, or with images.
        split: name of the split.
        option: name of the option that chooses the split, for messages.

    Raises:
        DataError: no such directory, a root of other splits, or no such split.
    """
    root = Path(data_dir)
    check_data_dir(root)
    if not stays_inside(split) or not Path(split).parts:
        raise DataError(f"{option_name(option, split)}: expected the name of a folder in {root}")
    folder = split_folder(root, split)
    if folder is not None:
        return folder
    folders = subfolders(root)
    if split not in SPLIT_NAMES or any(_is_split_name(name) for name in folders):
        raise DataError(
            f"{root}: no split {split!r}; folders there: {listed(folders)}. Choose one with "
            f"{option_name(option)}"
        )
    return root


def scan(folder: Path) -> Folder:
    """List every image under ``folder``; the first folder on the way to an image is its class.

    Hidden files and folders (``._x.jpg``, ``.ipynb_checkpoints``) are skipped. Links are followed; below each
    class folder every folder is read once, however many links lead to it.
    """
    root = Path(os.path.realpath(folder))
    _, names, files = next(os.walk(folder), ("", [], []))
    found = [(file, "") for file in files if _is_image(file)]
    for name in names:
        if name.startswith("."):
            continue
        for at, files in _each_once(folder / name, root):
            inside = at.relative_to(folder)
            found += (((inside / file).as_posix(), name) for file in files if _is_image(file))
    # by name, so that no choice depends on the order in which a file system lists files
    found.sort()
    images, classes = tuple(image for image, _ in found), tuple(name for _, name in found)
    return Folder(folder, images, classes, tuple(subfolders(folder)))


def _is_image(file: str) -> bool:
    return not file.startswith(".") and os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES


def _each_once(start: Path, root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield the visible folders under ``start``, itself included, each once, and the files in each.

    Links are followed after all else, in the order of their names: which of several paths to a folder is
    taken does not depend on the order in which a file system lists it. ``root`` is left out.
    """
    seen, starts = {root}, deque([start])
    while starts:
        start = starts.popleft()
        place = Path(os.path.realpath(start))
        for path, folders, files in os.walk(start, followlinks=True):
            at = Path(path)
            here = place / at.relative_to(start)
            if here in seen:
                folders.clear()
                continue
            seen.add(here)
            yield at, files
            links = {name for name in folders if os.path.islink(at / name)}
            visible = sorted(name for name in folders if not name.startswith("."))
            starts += (at / name for name in visible if name in links)
            folders[:] = (name for name in visible if name not in links)


def read_class_map(file: PathLike, num_classes: int | None) -> dict[str, int]:
    """Return class names with their index; the file has one name a line, in the order of the model's head.

    Raises:
        DataError: unreadable, a name twice, or not as many names as the head has classes.
    """
    path = Path(file)
    check_class_map(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: class map cannot be read: {error} ({option_name('class_map')})") from None
    while lines and not lines[-1].strip():
        lines.pop()
    names = [line.strip() for line in lines]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise DataError(
            f"{path}: class map names {twice[0]!r} twice; expected one class a line "
            f"({option_name('class_map')})"
        )
    if num_classes is not None and len(names) != num_classes:
        raise DataError(
            f"{path}: class map names {len(names)} classes, the model's head has {num_classes}; "
            f"expected one class a line in the head's order ({option_name('class_map')})"
        )
    return {name: index for index, name in enumerate(names)}


def label_images(
    folder: Folder, data: LabelledImages, num_classes: int | None, hint: str, *, other: str | None
) -> list[int]:
    """Return the class index of every image.

    Args:
        folder: images with their class folders, one split of ``data``.
        data: options that name them, and may name the classes in the order of the model's head.
        num_classes: of the model's head, to check the folders against.
        hint: advice that ends the message where labels are wrong.
        other: another labelled split, whose class folders must be the same where they give the labels.

    Raises:
        DataError: images outside class folders, an empty class folder, classes that the head does not have,
            or that are not those of the other split.
    """
    class_map = data.class_map
    if "" in folder.names:
        stray = folder.images[folder.names.index("")]
        raise DataError(
            f"{folder.path}: {stray} lies beside the class folders {listed(folder.classes)}; "
            f"expected every image in the folder of its class{hint}"
        )
    if class_map is not None:
        index = read_class_map(class_map, num_classes)
        unknown = [name for name in folder.classes if name not in index and name not in folder.empty]
        if unknown:
            raise DataError(
                f"{folder.path}: class folders not in {class_map}: {listed(unknown)} "
                f"({option_name('class_map')})"
            )
        return [index[name] for name in folder.names]
    if folder.empty:
        raise DataError(
            f"{folder.path}: class folders without images: {listed(folder.empty)}; without them the classes "
            "after them would shift. Fill them, or name the classes in the head's order with "
            f"{option_name('class_map')}"
        )
    if num_classes is not None and len(folder.classes) != num_classes:
        raise DataError(
            f"{folder.path}: {len(folder.classes)} class folders ({listed(folder.classes)}), "
            f"the model's head has {num_classes} classes. Name the classes in the head's order with "
            f"{option_name('class_map')}{hint}"
        )
    beside = None if other is None or data.data_dir is None else split_folder(Path(data.data_dir), other)
    if beside is not None:
        _check_same_classes(folder, beside, hint)
    index = {name: number for number, name in enumerate(folder.classes)}
    return [index[name] for name in folder.names]


def _check_same_classes(folder: Folder, beside: Path, hint: str) -> None:
    """Refuse another split with as many class folders, of which some have other names.

    One with more or fewer is refused when it is read, or has none for labels. Names that are all different
    may mean the same classes in the same order.
    """
    try:
        theirs = subfolders(beside)
    except DataError:  # which may not be read at all
        return
    here = [name for name in folder.classes if name not in set(theirs)]
    there = [name for name in theirs if name not in set(folder.classes)]
    if len(here) == len(there) and 0 < len(here) < len(theirs):
        raise DataError(
            f"{folder.path}: class folders are not those of {beside}: {listed(here)} only here, "
            f"{listed(there)} only there. Labels are the places of the sorted names; give both the same "
            f"folders{hint}"
        )
