"""Checks of input and output paths, untrusted JSON, and atomic writes. Imports nothing slow."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mhacut.errors import CheckpointError, DataError, OutputError, option_name

AnyPath = str | os.PathLike[str]
REMOTE = ("timm:", "hf-hub:", "hf_hub:")
"""Prefixes of checkpoint names that are downloaded."""
READ_IN_FOLDERS = re.compile(
    r"(open_clip_)?(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin|pth|pt)(\.index\.json)?"
    r"|(pruned|rest)\.safetensors|.*config\.json"
)
"""Names of the weight and config files that are read if a checkpoint is a folder."""


def show(path: AnyPath) -> str:
    """Return a path as printable text: undecodable bytes are replaced."""
    return os.fsencode(path).decode(errors="replace")


def reason_alone(error: Exception, path: AnyPath) -> str:
    """Return only the reason of an error message of the form ``path: reason; advice``."""
    return str(error).removeprefix(f"{show(path)}: ").partition("; ")[0]


def stem_of(path: Path) -> str:
    """Return the name of a checkpoint without its ending, the start of default output names.

    >>> stem_of(Path("runs/vit.safetensors")), stem_of(Path("vit.pth.tar"))
    ('vit', 'vit')
    """
    stem = Path(path.stem)
    return stem.stem if path.suffix == ".tar" and stem.suffix in (".pth", ".pt") else str(stem)


# -- inputs --


def check_checkpoint(path: AnyPath) -> None:
    """Raise a :class:`CheckpointError` unless ``path`` is a readable folder or non-empty file."""
    if not os.fspath(path):
        raise CheckpointError("expected the name of a checkpoint, found an empty one")
    if not os.path.isdir(path):
        regular_size(Path(path))
    elif not os.access(path, os.R_OK | os.X_OK):
        raise CheckpointError(f"{show(path)}: no permission to read the folder")


def regular_size(path: Path) -> int:
    # Checked before the file is opened: opening a FIFO would block.
    if not os.path.exists(path):
        hint = "; it is a link to a missing file" if path.is_symlink() else ""
        raise CheckpointError(f"no such file: {show(path)}{hint}")
    if os.path.isdir(path):
        raise CheckpointError(f"{show(path)}: is a directory, expected a file")
    if os.path.getsize(path) == 0:  # also devices and pipes
        raise CheckpointError(f"{show(path)}: file is empty (0 bytes); download or copy it again")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{show(path)}: no permission to read it")
    return os.path.getsize(path)


def check_data_dir(path: AnyPath) -> None:
    option = option_name("data_dir")
    if not os.path.isdir(path):
        raise DataError(f"{path}: no such directory ({option})")
    if not os.access(path, os.R_OK | os.X_OK):
        raise DataError(f"{path}: no permission to read it ({option})")


def check_class_map(path: AnyPath) -> None:
    if not os.path.isfile(path):  # also not a FIFO, whose reading would block
        raise DataError(f"{path}: class map cannot be read: no such file ({option_name('class_map')})")


# -- outputs --


def exists_already(path: Path) -> str:
    # A report has an option of its own for its name.
    name = "" if path.suffix in (".html", ".htm") else f" with {option_name('output')}"
    return f"exists already; choose another name{name}, or {option_name('overwrite', True)}"


def check_output(path: AnyPath, *, overwrite: bool, input_path: AnyPath | None) -> None:
    """Raise an :class:`OutputError` if ``path`` must not or cannot be written.

    ``input_path``, the checkpoint, is never replaced.
    """
    target = Path(path)
    if input_path is not None and _is_part_of(target, Path(input_path)):
        raise OutputError(
            f"{show(path)}: is the input {show(input_path)}, which is never overwritten; choose another name"
        )
    if os.path.isdir(target) or str(path).endswith("/"):
        raise OutputError(f"{show(path)}: is a directory; give the name of a file in it")
    if os.path.lexists(target) and not overwrite:
        raise OutputError(f"{show(path)}: {exists_already(target)}")
    # Writing ends with a rename, which would replace a device such as /dev/null.
    if os.path.exists(target) and not os.path.isfile(target):
        raise OutputError(f"{show(path)}: is a device, pipe or socket; choose another name")
    nearest = next((parent for parent in target.absolute().parents if os.path.lexists(parent)), Path("/"))
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK | os.X_OK):
        why = "writable" if os.path.isdir(nearest) else "a directory"
        raise OutputError(
            f"{show(target)}: cannot be created, {show(nearest)} is not {why}; choose another place"
        )


def _is_part_of(target: Path, source: Path) -> bool:
    """Whether ``target`` is the checkpoint ``source``, or a file inside this folder."""
    if os.path.isdir(source):
        real = Path(os.path.realpath(target))  # resolves links
        return str(real.parent) == os.path.realpath(source) and bool(READ_IN_FOLDERS.fullmatch(real.name))
    return target.exists() and source.exists() and os.path.samefile(target, source)


def check_outputs(
    paths: Iterable[AnyPath | None], *, overwrite: bool, input_paths: Iterable[AnyPath | None]
) -> None:
    """Raise an :class:`OutputError` if a path cannot be written, is an input file, or appears twice."""
    sources: list[AnyPath | None] = [source for source in input_paths if source is not None]
    seen: dict[str, AnyPath] = {}
    for path in paths:
        if path is None:
            continue
        for source in sources or [None]:
            check_output(path, overwrite=overwrite, input_path=source)
        real = os.path.realpath(path)
        if real in seen:
            raise OutputError(f"{show(path)}: is the same file as {show(seen[real])}; choose another name")
        seen[real] = path


def write_file(
    path: AnyPath,
    content: bytes | memoryview | Callable[[Path], object],
    *,
    overwrite: bool,
    input_path: AnyPath | None = None,
) -> None:
    """Write a file atomically: the file appears complete and flushed to disk, or not at all.

    ``content`` is the bytes, or a function that writes to a temporary path, which is then renamed.
    """
    check_output(path, overwrite=overwrite, input_path=input_path)
    target = Path(os.path.realpath(path))
    try:
        with temporary_folder(target) as folder:
            temporary = folder / target.name
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content)
            _finish(temporary)
            os.replace(temporary, target)
        # Without this, a power cut may undo the rename. Some file systems cannot flush a directory.
        with suppress(OSError):
            sync(target.parent)
    except OSError as error:
        raise OutputError(f"{show(path)}: cannot be written: {error.strerror or error}") from error


def fill_folder(path: AnyPath, fill: Callable[[Path], object]) -> None:
    """Write the files of a folder, each atomically, once all are complete.

    Files of the same names are replaced. Other files stay.
    """
    target = Path(path)
    try:
        with temporary_folder(target) as temporary:
            fill(temporary)
            files = list(temporary.iterdir())
            for file in files:
                _finish(file)
            target.mkdir(exist_ok=True)
            for file in files:
                os.replace(file, target / file.name)
        with suppress(OSError):
            sync(target)
    except OSError as error:
        raise OutputError(f"{show(target)}: cannot be written: {error.strerror or error}") from error


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Make a hidden folder beside ``target``, and remove it at the end of the block."""
    # A folder, not a file: libraries write temporary files of their own beside the target.
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(".tmp", f".{target.name[:100]}.", target.parent)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _finish(path: Path) -> None:
    """Flush a file to disk and give it the permissions of a new file (umask)."""
    # Temporary files of libraries are readable only by their owner.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)
    sync(path)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- untrusted JSON ---


def read_json(path: Path) -> dict[str, Any]:
    regular_size(path)  # to open a pipe would block
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{show(path)}: cannot be read: {error}") from None
    return parse_json(text, show(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also of integers of thousands of digits
        raise CheckpointError(f"{where}: not valid JSON ({error!s:.200})") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(document).__name__}")
    return document


def plain_json(value: object) -> Any:
    """Return ``value`` as it looks after writing and reading JSON."""
    # There and back, so that what is compared with a file later is what the file will hold.
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"a value of the model's description cannot be stored as JSON: {error!s:.200}"
        ) from None
