"""Writing a slim file: whole or not at all, never over the input, compared before it gets its name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mhacut.checkpoint.header import FLOAT_DTYPES
from mhacut.checkpoint.load import read_header
from mhacut.checkpoint.record import METADATA_KEY, SlimRecord
from mhacut.errors import MhacutError, OutputError
from mhacut.runtime.files import check_output, show, write_whole

_SPARE_BYTES = 2**20


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
