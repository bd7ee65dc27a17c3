"""Write files whole or not at all, and never over the input."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mhacut.errors import OutputError, option_name

AnyPath = str | os.PathLike[str]


def show(path: AnyPath) -> str:
    """Return ``path`` as text for a message, undecodable bytes replaced."""
    return os.fsencode(path).decode(errors="replace")


def check_output(path: AnyPath, *, overwrite: bool, input_path: AnyPath | None) -> None:
    """Raise an :class:`OutputError` if ``path`` must not or cannot be written. Touches nothing.

    Commands call it before they begin to work.

    Args:
        path: the file to be written.
        overwrite: whether an existing file may be replaced.
        input_path: the checkpoint it is made from (a file or a timm folder), which is never replaced.
    """
    target = Path(path)
    if not target.name or str(path).endswith(("/", os.sep)):
        raise OutputError(f"{show(path)}: expected the name of a file to write, found a directory's")
    _check_not_input(target, input_path)
    if os.path.lexists(target):
        _check_replaceable(target, overwrite)
    for parent in target.absolute().parents:
        if os.path.lexists(parent):
            if not parent.is_dir():
                raise OutputError(f"{show(target)}: cannot be created, {show(parent)} is not a directory")
            if not os.access(parent, os.W_OK | os.X_OK):
                raise OutputError(f"{show(target)}: no permission to write in {show(parent)}")
            break


def write_whole(
    path: AnyPath,
    content: bytes | memoryview | Callable[[Path], object],
    *,
    overwrite: bool,
    input_path: AnyPath | None = None,
) -> None:
    """Make the file ``path`` appear complete and flushed to disk, or not at all.

    The content goes to a temporary file in the same directory, which is then renamed. The file's mode
    follows the umask.

    Args:
        path: the file; its directory is created.
        content: the bytes, or a function that writes (and may check) the file whose name it is given.
        overwrite: replace an existing file (the file that a link points to, if it is a link).
        input_path: the checkpoint the content is made from, which is never replaced.

    Raises:
        OutputError: the file must not or cannot be written; an existing file is untouched.
    """
    check_output(path, overwrite=overwrite, input_path=input_path)
    # A link stays a link; its target is replaced.
    target = Path(os.path.realpath(path)) if overwrite else Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(target)
        try:
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content)
            # Libraries make files only their owner can read; ours are like any other.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            sync(temporary)
            _publish(temporary, target, overwrite)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()
    except OSError as error:
        raise OutputError(f"{show(target)}: cannot be written: {error.strerror or error}") from error


def temporary_path(target: Path) -> Path:
    """Return a hidden, unused name beside ``target`` for its content until that is complete."""
    return target.parent / f"{_prefix(target)}{secrets.token_hex(6)}.tmp"


def remove_temporaries(target: Path) -> None:
    """Remove the temporary files of ``target`` that killed processes left. Nobody may be writing it."""
    pattern = re.compile(re.escape(_prefix(target)) + r"[0-9a-f]{12}\.tmp")
    for path in target.parent.glob(".*.tmp"):
        if pattern.fullmatch(path.name):
            with suppress(OSError):
                path.unlink()


def _prefix(target: Path) -> str:
    return f".{target.name[:100]}."


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Flush the entries of a directory where the file system can."""
    with suppress(OSError):
        sync(path)


def _check_not_input(target: Path, input_path: AnyPath | None) -> None:
    if input_path is None:
        return
    source = Path(input_path)
    inputs = [source, *(source.iterdir() if source.is_dir() else ())]
    for existing in inputs:
        with suppress(OSError):
            if os.path.realpath(target) == os.path.realpath(existing) or os.path.samefile(target, existing):
                raise OutputError(
                    f"{show(target)}: is the input {show(existing)}, which is never overwritten; "
                    "choose another name"
                )


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise OutputError(f"{show(target)}: is a directory; give the name of a file in it")
    if not overwrite:
        raise OutputError(
            f"{show(target)}: exists already; choose another name, or {option_name('overwrite', True)}"
        )
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        raise OutputError(
            f"{show(target)}: is not a regular file (a device, pipe or socket); choose another name"
        )


def _publish(temporary: Path, target: Path, overwrite: bool) -> None:
    """Give the finished file its name; without ``overwrite`` in a step that fails if the name was taken."""
    if overwrite:
        os.replace(temporary, target)
    else:
        try:
            _rename_to_unused(temporary, target)
        except FileExistsError:
            raise OutputError(
                f"{show(target)}: was created by someone else meanwhile; choose another name, or "
                f"{option_name('overwrite', True)}"
            ) from None
    sync_directory(target.parent)


def _rename_to_unused(temporary: Path, target: Path) -> None:
    try:
        os.link(temporary, target)
    except OSError as error:
        without_links = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
        if error.errno not in without_links:
            raise
        # No hard links on this file system: claim the name first, then fill it.
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, target)
