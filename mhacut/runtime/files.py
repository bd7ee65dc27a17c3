"""Write files whole or not at all, and never over the input."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mhacut.errors import OutputError, option_name

if sys.platform != "win32":
    import fcntl

AnyPath = str | os.PathLike[str]
READ_IN_FOLDERS = re.compile(
    r"(open_clip_)?(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin|pth|pt)(\.index\.json)?|.*config\.json"
)
"""Names of the files of a folder that are read as one checkpoint."""
_LOCK = "lock"
"""Name of the file in a temporary folder that is locked while its process runs."""
_left: set[Path] = set()
"""Temporary folders that their own process does not remove."""


def show(path: AnyPath) -> str:
    """Return ``path`` as text for a message, undecodable bytes replaced."""
    return os.fsencode(path).decode(errors="replace")


def reason_alone(error: Exception, path: AnyPath) -> str:
    """Return the message of ``error`` about the file ``path`` without its name, and without what to do."""
    return str(error).removeprefix(f"{show(path)}: ").partition("; ")[0]


def check_output(path: AnyPath, *, overwrite: bool, input_path: AnyPath | None) -> None:
    """Raise an :class:`OutputError` if ``path`` must not or cannot be written. Leaves nothing behind.

    Commands call it before they begin to work.

    Args:
        path: the file to be written.
        overwrite: whether an existing file may be replaced.
        input_path: the checkpoint it is made from (a file or a timm folder), which is never replaced.
    """
    _check_allowed(path, overwrite=overwrite, input_path=input_path)
    check_creatable(_destination(path, overwrite))


def check_creatable(target: Path) -> None:
    """Raise an :class:`OutputError` if a file or folder cannot be made there: make one, and remove it.

    Permissions do not suffice to know: there are file systems that are read-only, full, or like ``/proc``.

    Args:
        target: its name; what is made has another, and lies in the nearest directory that exists.
    """
    nearest = next((parent for parent in target.absolute().parents if os.path.lexists(parent)), None)
    if nearest is None:
        raise OutputError(f"{show(target)}: cannot be created, it lies in no directory; choose another place")
    if not os.path.isdir(nearest):
        raise OutputError(f"{show(target)}: cannot be created, {show(nearest)} is not a directory")
    try:
        with temporary_folder(nearest / target.name) as folder:
            (folder / target.name).touch()
    except OSError as error:
        raise OutputError(
            f"{show(target)}: cannot be created in {show(nearest)}: {error.strerror or error}; "
            "choose another place"
        ) from error


def _destination(path: AnyPath, overwrite: bool) -> Path:
    """Return the file to write: a link stays a link, and what it points to is replaced."""
    return Path(os.path.realpath(path)) if overwrite else Path(path)


def _check_allowed(path: AnyPath, *, overwrite: bool, input_path: AnyPath | None) -> None:
    target = Path(path)
    if not target.name or str(path).endswith(("/", os.sep)):
        raise OutputError(f"{show(path)}: expected the name of a file to write, found a directory's")
    if target.suffix == ".safetensors" and show(path) != os.fspath(path):
        raise OutputError(f"{show(path)}: is not UTF-8, which safetensors needs; choose another name")
    _check_not_input(target, input_path)
    if os.path.lexists(target):
        _check_replaceable(target, overwrite)


def check_outputs(
    paths: Iterable[AnyPath | None], *, overwrite: bool, input_paths: Iterable[AnyPath | None]
) -> None:
    """Call :func:`check_output` for each of ``paths``, which must be different files; None is no file.

    Args:
        paths: files to be written.
        overwrite: whether existing files may be replaced.
        input_paths: files and folders that are read, which are never replaced.
    """
    sources, seen = tuple(input_paths), dict[str, AnyPath]()
    for path in paths:
        if path is None:
            continue
        for source in sources:
            _check_not_input(Path(path), source)
        check_output(path, overwrite=overwrite, input_path=None)
        real = os.path.realpath(path)
        if real in seen:
            raise OutputError(f"{show(path)}: is the same file as {show(seen[real])}; choose another name")
        seen[real] = path


def write_whole(
    path: AnyPath,
    content: bytes | memoryview | Callable[[Path], object],
    *,
    overwrite: bool,
    input_path: AnyPath | None = None,
) -> os.stat_result:
    """Make the file ``path`` appear complete and flushed to disk, or not at all.

    The content goes to a file in a temporary folder beside it, which is then renamed. The file's mode
    follows the umask.

    Args:
        path: the file; its directory is created.
        content: the bytes, or a function that writes (and may check) the file whose name it is given.
        overwrite: replace an existing file (the file that a link points to, if it is a link).
        input_path: the checkpoint the content is made from, which is never replaced.

    Returns:
        Status of the file, by which :func:`check_still` knows it again.

    Raises:
        OutputError: the file must not or cannot be written; an existing file is untouched.
    """
    _check_allowed(path, overwrite=overwrite, input_path=input_path)
    target = _destination(path, overwrite)
    try:
        with temporary_folder(target) as folder:
            temporary = folder / target.name
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content)
            _open_to_others(temporary)
            sync(temporary)
            status = os.stat(temporary)
            _publish(temporary, target, overwrite)
    except OSError as error:
        raise OutputError(f"{show(target)}: cannot be written: {error.strerror or error}") from error
    return status


def check_still(path: AnyPath, written: os.stat_result) -> None:
    """Raise an :class:`OutputError` if ``path`` is not the file that :func:`write_whole` wrote."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise OutputError(
            f"{show(path)}: was removed by another process meanwhile; choose another name"
        ) from None
    # Not by its inode: that of a removed file is used again, and some network file systems change it.
    if (found.st_size, found.st_mtime_ns) != (written.st_size, written.st_mtime_ns):
        raise OutputError(f"{show(path)}: was replaced by another process meanwhile; choose another name")


def write_whole_folder(path: AnyPath, fill: Callable[[Path], object]) -> None:
    """Make the folder ``path`` appear complete and flushed to disk, or not at all.

    In a folder that exists, files of the same names are replaced, each of them whole; others stay.

    Args:
        path: the folder; its directory is created.
        fill: writes (and may check) the files in the folder whose name it is given.

    Raises:
        OutputError: it cannot be written.
    """
    target = Path(path)
    try:
        with temporary_folder(target) as folder:
            temporary = folder / target.name
            temporary.mkdir()
            fill(temporary)
            for file in temporary.iterdir():
                _open_to_others(file)
                sync(file)
            sync_directory(temporary)
            if os.path.isdir(target):
                for file in temporary.iterdir():
                    os.replace(file, target / file.name)
                sync_directory(target)
            else:
                os.rename(temporary, target)
            sync_directory(target.parent)
    except OSError as error:
        raise OutputError(f"{show(target)}: cannot be written: {error.strerror or error}") from error


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Make a hidden folder beside ``target`` for its content until that is complete; remove it at the end.

    It stays where :func:`left_on_error` says so.

    A folder, because libraries write temporary files of their own beside the file that they are given.
    Folders left by killed processes are removed first.
    """
    _make_directory(target.parent)
    remove_temporaries(target)
    folder, lock = _locked_folder(target)
    try:
        yield folder
    finally:
        if folder not in _left:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def left_on_error(folder: Path) -> Iterator[None]:
    """Leave the :func:`temporary_folder` if the block fails: it may hold the only copy of a file."""
    _left.add(folder)
    yield
    _left.remove(folder)


def remove_temporaries(target: Path) -> None:
    """Remove the temporary folders of ``target`` that killed processes left, not those being written."""
    pattern = re.compile(re.escape(_prefix(target)) + r"[0-9a-f]{12}\.tmp")
    with suppress(OSError):
        for name in os.listdir(target.parent):
            if pattern.fullmatch(name):
                with suppress(OSError):
                    _remove_abandoned(target.parent / name)


def _remove_abandoned(folder: Path) -> None:
    lock = _locked(folder)
    if lock is not None:
        try:
            shutil.rmtree(folder)
        finally:
            os.close(lock)


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    """Make a temporary folder; return it, and the descriptor whose lock lasts as long as this process."""
    while True:
        folder = target.parent / f"{_prefix(target)}{secrets.token_hex(6)}.tmp"
        folder.mkdir(mode=0o700)
        try:
            lock = _locked(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process took it for abandoned, before it was locked
        except OSError:
            return folder, None  # no locks on this file system, so that nobody takes it for abandoned
        return folder, lock


def _locked(folder: Path) -> int | None:
    """Lock a temporary folder; return the descriptor that holds the lock until it is closed, however that is.

    Raises:
        BlockingIOError: another process holds it.
        FileNotFoundError: the folder is gone.
        OSError: there are no locks here.
    """
    if sys.platform == "win32":
        return None
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), os.stat(folder / _LOCK)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    except BaseException:
        os.close(lock)
        raise
    return lock


def _prefix(target: Path) -> str:
    return f".{target.name[:100]}."


def _make_directory(path: Path) -> None:
    """Make a directory with its parents, and flush the entry of each that is new to disk."""
    missing = [parent for parent in (path, *path.parents) if not os.path.exists(parent)]
    path.mkdir(parents=True, exist_ok=True)
    for parent in missing:
        sync_directory(parent.parent)


def _open_to_others(path: Path) -> None:
    """Give a file the mode that the umask asks for: libraries make files that only their owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


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
    inputs = [source]
    with suppress(OSError):  # may not be looked at
        if os.path.isdir(source):
            inputs += [file for file in source.iterdir() if READ_IN_FOLDERS.fullmatch(file.name)]
    for existing in inputs:
        with suppress(OSError):
            if os.path.realpath(target) == os.path.realpath(existing) or os.path.samefile(target, existing):
                raise OutputError(
                    f"{show(target)}: is the input {show(existing)}, which is never overwritten; "
                    "choose another name"
                )


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if os.path.isdir(target):
        raise OutputError(f"{show(target)}: is a directory; give the name of a file in it")
    if not overwrite:
        raise OutputError(
            f"{show(target)}: exists already; choose another name, or {option_name('overwrite', True)}"
        )
    if os.path.exists(target) and not stat.S_ISREG(target.stat().st_mode):
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
