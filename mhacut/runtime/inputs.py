"""Check that all inputs exist before any is read; imports nothing that takes time."""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePath

from mhacut.errors import CheckpointError, DataError, option_name
from mhacut.runtime.files import AnyPath, show

REMOTE = ("timm:", "hf-hub:", "hf_hub:")
"""Beginnings of checkpoints that are no paths."""

_MAX_CLASS_MAP = 2**24
"""Largest size of a class map: 21,841 names of ImageNet-21k take half a megabyte."""


def stem_of(path: Path) -> str:
    """Return the beginning of default output names.

    >>> stem_of(Path("runs/vit.safetensors")), stem_of(Path("vit.pth.tar"))
    ('vit', 'vit')
    """
    stem = Path(path.stem)
    return stem.stem if path.suffix == ".tar" and stem.suffix in (".pth", ".pt") else str(stem)


def check_checkpoint(path: AnyPath) -> None:
    """Raise a :class:`CheckpointError` unless ``path`` is a folder, or a file with something in it."""
    if not os.fspath(path):
        raise CheckpointError("expected the name of a checkpoint, found an empty one")
    if os.fspath(path).endswith(os.sep) and not os.path.lexists(Path(path)):
        raise CheckpointError(f"no such folder: {show(path)}")
    if not is_directory(Path(path)):
        regular_size(Path(path))
    elif not os.access(path, os.R_OK | os.X_OK):
        raise CheckpointError(f"{show(path)}: no permission to read the folder")


def is_directory(path: Path) -> bool:
    """Whether ``path`` is a directory, not a file.

    Raises:
        CheckpointError: it is neither.
    """
    return stat.S_ISDIR(_stat(path).st_mode)


def regular_size(path: Path) -> int:
    """Return the size of the file in bytes. Called before opening it, since opening a FIFO would block.

    Raises:
        CheckpointError: it is no regular file, empty, or may not be read.
    """
    status = _stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise CheckpointError(f"{show(path)}: is a directory, expected a file")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{show(path)}: is not a regular file (a device, pipe or socket)")
    if status.st_size == 0:
        raise CheckpointError(f"{show(path)}: file is empty (0 bytes); download or copy it again")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{show(path)}: no permission to read it")
    return status.st_size


def is_no_file(path: AnyPath) -> bool:
    """Whether ``path`` exists, but is no regular file; reading a FIFO would block."""
    return os.path.exists(path) and not os.path.isfile(path)


def stays_inside(name: str) -> bool:
    r"""Whether ``name``, joined to a folder, is a place in that folder, links aside.

    >>> stays_inside("part/a.tar"), stays_inside("/a.tar"), stays_inside("part/../../a.tar")
    (True, False, False)
    """
    # On Windows, "\\x" and "C:x" leave the folder and are not absolute; both have an anchor.
    return not PurePath(name).anchor and ".." not in PurePath(name).parts


def _stat(path: Path) -> os.stat_result:
    try:
        return os.stat(path)
    except FileNotFoundError:
        hint = "; it is a link to a missing file" if path.is_symlink() else ""
        raise CheckpointError(f"no such file: {show(path)}{hint}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(f"{show(path)}: cannot be opened: {reason}") from None


def check_data_dir(path: AnyPath) -> None:
    """Raise a :class:`DataError` unless ``path`` is a directory that may be read."""
    root, option = Path(path), option_name("data_dir")
    try:
        mode = os.stat(root).st_mode
    except PermissionError:
        raise DataError(f"{root}: no permission to read it ({option})") from None
    except (OSError, ValueError):
        raise DataError(f"{root}: no such directory ({option})") from None
    if not stat.S_ISDIR(mode):
        raise DataError(f"{root}: is a file; {option} expects a directory with images")
    if not os.access(root, os.R_OK | os.X_OK):
        raise DataError(f"{root}: no permission to read it ({option})")


def check_class_map(path: AnyPath) -> None:
    """Raise a :class:`DataError` if ``path`` cannot be read, or is no small file."""
    option = option_name("class_map")
    try:
        status = os.stat(path)  # opening a FIFO would block
        if stat.S_ISREG(status.st_mode):
            with open(path, "rb"):
                pass
    except OSError as error:
        raise DataError(f"{path}: class map cannot be read: {error} ({option})") from None
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_CLASS_MAP:
        raise DataError(
            f"{path}: class map cannot be read: expected a file of at most {_MAX_CLASS_MAP} bytes, one class "
            f"a line ({option})"
        )
