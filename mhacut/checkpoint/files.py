"""Read checkpoint files: find out the format by content, then the header or the tensors.

Nothing here trusts a suffix, runs code from a file, extracts an archive, or follows a name found in a file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mhacut.checkpoint.folder import open_folder
from mhacut.checkpoint.header import FileHeader, Format, TensorInfo
from mhacut.checkpoint.safetensors_file import safetensors_header, safetensors_tensors
from mhacut.checkpoint.torch_file import torch_header, torch_tensors
from mhacut.errors import CheckpointError
from mhacut.runtime.files import show
from mhacut.runtime.inputs import is_directory, regular_size

_MAX_HEADER_BYTES = 100_000_000
"""Largest safetensors header; the limit of the library."""


def read_file_header(source: str | os.PathLike[str]) -> FileHeader:
    """Read the header of the checkpoint at ``source``: a safetensors or torch file, or a folder.

    Raises:
        CheckpointError: it is not a readable checkpoint; the message says what it looks like instead.
    """
    path = Path(source)
    if not is_directory(path):
        return _file_header(path)
    folder = open_folder(path)
    header = _file_header(folder.weights[0]) if len(folder.weights) == 1 else _sharded_header(folder.weights)
    return dataclasses.replace(header, config=folder.config, preprocessor=folder.preprocessor)


def _file_header(path: Path) -> FileHeader:
    size = regular_size(path)
    if _sniff(path, size) == "safetensors":
        tensors, metadata = safetensors_header(path, size)
        return FileHeader(path, "safetensors", tensors, metadata)
    return torch_header(path, size)


def _sharded_header(paths: Sequence[Path]) -> FileHeader:
    """Return the header of several safetensors files that hold one model."""
    tensors: dict[str, TensorInfo] = {}
    shards = {}
    for path in paths:
        header = _file_header(path)
        twice = tensors.keys() & header.tensors.keys()
        if header.format != "safetensors" or twice:
            what = (
                f"tensor {min(twice)!r:.150} is in another shard too" if twice else "not a safetensors file"
            )
            raise CheckpointError(f"{show(path)}: {what}; download the folder again")
        shards[path] = header.tensors
        tensors |= header.tensors
    return FileHeader(paths[0], "safetensors", tensors, shards=shards)


def read_tensors(header: FileHeader) -> dict[str, Tensor]:
    """Read the tensors that ``header`` announced, on the CPU, in the file's dtypes.

    Raises:
        CheckpointError: the file cannot be read, or is no longer what the header announced.
    """
    if header.format == "safetensors":
        tensors: dict[str, Tensor] = {}
        for path, names in (header.shards or {header.path: header.tensors}).items():
            tensors |= safetensors_tensors(path, names)
    else:
        tensors = torch_tensors(header)
    found = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if found != dict(header.tensors):
        raise CheckpointError(f"{show(header.path)}: changed while it was read; try again")
    return tensors


def sha256_of_file(header: FileHeader) -> str:
    """Return the hex digest of the file's bytes; of several, the digest of their digests in order."""
    if not header.shards:
        return sha256_of(header.path)
    digests = "".join(map(sha256_of, header.shards))
    return hashlib.sha256(digests.encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the hex digest of the file's bytes."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _sha256(file)
        )


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _sniff(path: Path, size: int) -> Format:
    """Return the format by content, or raise an error that says what the file looks like."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{show(path)}: cannot be opened: {error.strerror}") from None
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "torch"
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{show(path)}: this is a git-lfs pointer, not the checkpoint itself; run git lfs pull"
        )
    header_bytes = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and header_bytes <= _MAX_HEADER_BYTES:
        return "safetensors"
    if re.match(rb"\x80[\x02-\x05]", start):
        return "torch"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<"):
        raise CheckpointError(
            f"{show(path)}: this is an HTML page, not a checkpoint; download the file itself"
        )
    if start[257:262] == b"ustar":
        raise CheckpointError(
            f"{show(path)}: this is a tar archive (a very old torch format); load it with the torch that "
            "made it and save the state dict again"
        )
    if size < 9:
        raise CheckpointError(f"{show(path)}: {size} bytes are too few for a checkpoint")
    if text.startswith(b"{"):
        raise CheckpointError(
            f"{show(path)}: this is JSON text, not a checkpoint; give the file with the weights"
        )
    if start[8:9] == b"{":
        raise CheckpointError(
            f"{show(path)}: not a safetensors file: its header would be {header_bytes} bytes, "
            f"at most {_MAX_HEADER_BYTES} are allowed"
        )
    raise CheckpointError(
        f"{show(path)}: not a checkpoint: neither safetensors nor a torch file by its first bytes "
        f"{start[:8]!r}"
    )
