"""Read safetensors files with the library's parser, within bounds on what it is given."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mhacut.checkpoint.header import DTYPES, TensorInfo
from mhacut.checkpoint.untrusted_json import check_no_key_twice
from mhacut.errors import CheckpointError
from mhacut.runtime.files import show

_MAX_TENSORS = 100_000
"""Largest number of tensors; the largest model of timm has about 3,000."""
MAX_HEADER_BYTES = 100_000_000
"""Largest header; the limit of the library."""
_END_OF_TENSOR = re.compile(rb'"data_offsets"\s*:\s*\[\s*\d+\s*,\s*(\d{1,20})\s*\]')


def safetensors_header(path: Path, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return the tensors and the metadata that a safetensors file of ``size`` bytes announces.

    The library checks that the tensors cover the file without holes and overlaps.

    Raises:
        CheckpointError: the header is too large, damaged, or announces dtypes that are not supported.
    """
    where = show(path)
    header = _bounded_header(path, size)
    if where != os.fspath(path):
        raise CheckpointError(f"{where}: its name is not UTF-8, which reading safetensors needs; rename it")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            announced = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{where}: {_explained(error, header, size)}") from None
    check_no_key_twice(header.decode(), where)  # the library takes the last one
    if not announced:
        raise CheckpointError(f"{where}: holds no tensors")
    for name, (dtype, _) in announced.items():
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{where}: tensor {name!r:.200}: quantised or complex weights are not supported, "
                f"found {dtype}, expected a float dtype"
            )
    return {name: TensorInfo(shape, DTYPES[dtype]) for name, (dtype, shape) in announced.items()}, metadata


def safetensors_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Read the tensors of these names, on the CPU, in the file's dtypes; they are views of the mapped file.

    Raises:
        CheckpointError: the file cannot be read, or lacks one of them.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{show(path)}: cannot be read: {error}") from error


def _bounded_header(path: Path, size: int) -> bytes:
    """Return the header's bytes, refused where parsing them would take more than any real file needs."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{show(path)}: not a safetensors file: its header would be {length} bytes, at most "
                f"{MAX_HEADER_BYTES} are allowed"
            )
        if length > size - 8:
            raise CheckpointError(
                f"{show(path)}: truncated: the header says {length} bytes, the file has {size - 8} after "
                "its first 8; download or copy it again"
            )
        header = file.read(length)
    tensors = header.count(b'"dtype"')  # in metadata the quotes would be escaped
    if tensors > _MAX_TENSORS:
        raise CheckpointError(f"{show(path)}: {tensors} tensors, expected at most {_MAX_TENSORS}")
    return header


def _explained(error: Exception, header: bytes, size: int) -> str:
    """Return what the library found wrong, with what to do about it."""
    reason = str(error).removeprefix("Error while deserializing header: ")
    if "incomplete metadata" in reason:  # the tensors end before or after the file does
        found = size - 8 - len(header)
        expected = max((int(end) for end in _END_OF_TENSOR.findall(header)), default=0)
        if found > expected:
            return f"{found - expected} unexpected bytes after the last tensor"
        return f"truncated: {found} of {expected} bytes of weights; download or copy it again"
    shown = ascii(reason)[1:-1]
    return f"damaged safetensors header ({shown:.200}); download or copy it again"
