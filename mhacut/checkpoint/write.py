"""Writing a slim file: whole or not at all, never over the input, compared before it gets its name."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from mhacut.checkpoint.header import FLOAT_DTYPES, show
from mhacut.checkpoint.load import read_header
from mhacut.checkpoint.record import METADATA_KEY, SlimRecord
from mhacut.errors import MhacutError, OutputError

_SPARE_BYTES = 2**20


def check_output(
    path: str | os.PathLike[str], *, overwrite: bool, input_path: str | os.PathLike[str] | None
) -> None:
    """Raise an :class:`OutputError` if ``path`` must not or cannot be written: the check before any work.

    Args:
        path: where the slim file is to go.
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


def write_slim(
    path: str | os.PathLike[str],
    model: nn.Module,
    record: SlimRecord,
    *,
    dtypes: Mapping[str, torch.dtype],
    overwrite: bool,
    input_path: str | os.PathLike[str] | None,
) -> None:
    """Write ``model`` and its record to ``path`` as one safetensors file.

    The file appears under its name complete, flushed and compared with the model bit for bit, or not at
    all; its mode follows the umask.

    Args:
        path: the file; its directory is created.
        model: the slim model.
        record: what the file says about itself.
        dtypes: per tensor name the dtype to write it in; tensors not named keep their own.
        overwrite: replace an existing file (what a link points to, if it is a link).
        input_path: the checkpoint it was made from, never replaced.

    Raises:
        OutputError: the file must not or cannot be written; what was there before is untouched.
    """
    check_output(path, overwrite=overwrite, input_path=input_path)
    tensors = _as_stored(model, dtypes)
    metadata = {"format": "pt", METADATA_KEY: record.to_json()}

    def write(temporary: Path) -> None:
        _check_space(Path(path), tensors, metadata)
        _save(temporary, tensors, metadata)
        _compare(temporary, Path(path), tensors, record)

    write_whole(path, write, overwrite=overwrite, input_path=input_path)


def write_whole(
    path: str | os.PathLike[str],
    write: Callable[[Path], None],
    *,
    overwrite: bool,
    input_path: str | os.PathLike[str] | None,
) -> None:
    """Make the file ``path`` appear complete, or not at all.

    Args:
        path: the file; its directory is created.
        write: writes and checks a file of the name it is given, beside ``path``.
        overwrite: replace an existing file (what a link points to, if it is a link).
        input_path: the checkpoint it is made from, never replaced.

    Raises:
        OutputError: the file must not or cannot be written; what was there before is untouched.
    """
    check_output(path, overwrite=overwrite, input_path=input_path)
    # A link stays a link; its target is replaced.
    target = Path(os.path.realpath(path)) if overwrite else Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".{target.name[:100]}.{secrets.token_hex(6)}.tmp"
        try:
            write(temporary)
            # Libraries make files only their owner can read; ours are like any other.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            _sync(temporary)
            _publish(temporary, target, overwrite)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()
    except OSError as error:
        raise OutputError(f"{show(target)}: cannot be written: {error.strerror or error}") from error


def _check_not_input(target: Path, input_path: str | os.PathLike[str] | None) -> None:
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
        raise OutputError(f"{show(target)}: exists already; choose another name, or --overwrite")
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        raise OutputError(
            f"{show(target)}: is not a regular file (a device, pipe or socket); choose another name"
        )


def _as_stored(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """The tensors as they go to disk: own memory, contiguous, in the dtype asked for, finite."""
    stored: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        dtype = dtypes.get(name, tensor.dtype)
        if tensor.dtype not in FLOAT_DTYPES:
            dtype = tensor.dtype  # counters and index tables
        fresh = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if fresh.is_floating_point() and not bool(torch.isfinite(fresh).all()):
            too_large = bool(torch.isfinite(tensor).all())
            reason = (
                f"has values too large for {str(dtype).removeprefix('torch.')}"
                if too_large
                else "is not finite"
            )
            raise OutputError(f"tensor {name!r}: {reason}; nothing was written")
        stored[name] = fresh
    return stored


def _check_space(target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    needed += sum(map(len, metadata.values())) + _SPARE_BYTES
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise OutputError(f"{show(target)}: needs {needed} bytes, the disk has {free} free")


def _save(temporary: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, temporary, metadata)
    except SafetensorError as error:
        raise OutputError(f"{show(temporary.parent)}: cannot be written to: {error}") from error
    _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Put the metadata in a fixed order (the library's is random), so that equal models are equal files."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def _compare(temporary: Path, target: Path, tensors: Mapping[str, Tensor], record: SlimRecord) -> None:
    """Read back what was written, as a later reader will, and compare it bit for bit."""
    from mhacut.checkpoint.files import read_tensors

    try:
        header = read_header(temporary)
        found = read_tensors(header.file)
    except MhacutError as error:
        raise OutputError(f"{show(target)}: what was written could not be read back: {error}") from error
    if header.record != record or set(found) != set(tensors):
        raise OutputError(f"{show(target)}: what was read back is not what was written; is the disk sound?")
    for name, tensor in tensors.items():
        if tensor.dtype != found[name].dtype or not _same_bits(tensor, found[name]):
            raise OutputError(f"{show(target)}: tensor {name!r} read back differs; is the disk sound?")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )


def _publish(temporary: Path, target: Path, overwrite: bool) -> None:
    """Give the finished file its name; without ``overwrite`` in a step that fails if the name was taken."""
    if overwrite:
        os.replace(temporary, target)
    else:
        try:
            try:
                os.link(temporary, target)
            except OSError as error:
                if error.errno not in (
                    errno.EPERM,
                    errno.ENOTSUP,
                    errno.EOPNOTSUPP,
                    errno.ENOSYS,
                    errno.EMLINK,
                ):
                    raise
                # No hard links on this file system: claim the name first, then fill it.
                os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                os.replace(temporary, target)
        except FileExistsError:
            raise OutputError(
                f"{show(target)}: was created by someone else meanwhile; choose another name, or --overwrite"
            ) from None
    with suppress(OSError):  # a directory cannot be flushed everywhere
        _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
