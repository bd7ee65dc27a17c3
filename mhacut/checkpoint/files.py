"""Read checkpoint files: find out the format by content, then the header or the tensors.

Nothing here trusts a suffix, runs code from a file, extracts an archive, or follows a name found in a file.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from mhacut.checkpoint.header import FileHeader, Format, TensorInfo
from mhacut.checkpoint.safetensors_file import safetensors_header, safetensors_tensors
from mhacut.checkpoint.torch_file import torch_header, torch_tensors
from mhacut.checkpoint.untrusted_json import parse_json
from mhacut.errors import CheckpointError, option_name
from mhacut.runtime.files import show
from mhacut.runtime.inputs import is_directory, regular_size

_MAX_CONFIG_BYTES = 4 * 2**20
_MAX_HEADER_BYTES = 100_000_000
"""Largest safetensors header; the limit of the library."""
_WEIGHT_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "model.pth",
    "model.pt",
)


def read_file_header(source: str | os.PathLike[str]) -> FileHeader:
    """Read the header of the checkpoint at ``source``: a safetensors or torch file, or a timm folder.

    Raises:
        CheckpointError: it is not a readable checkpoint; the message says what it looks like instead.
    """
    path = Path(source)
    config = None
    if is_directory(path):
        path, config = _open_folder(path)
    size = regular_size(path)
    if _sniff(path, size) == "safetensors":
        tensors, metadata = safetensors_header(path, size)
        return FileHeader(path, "safetensors", tensors, metadata, config)
    return torch_header(path, size, config)


def read_tensors(header: FileHeader) -> dict[str, Tensor]:
    """Read the tensors that ``header`` announced, on the CPU, in the file's dtypes.

    Raises:
        CheckpointError: the file cannot be read, or is no longer what the header announced.
    """
    if header.format == "safetensors":
        tensors = safetensors_tensors(header.path, header.tensors)
    else:
        tensors = torch_tensors(header)
    found = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if found != dict(header.tensors):
        raise CheckpointError(f"{show(header.path)}: changed while it was read; try again")
    return tensors


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


def _open_folder(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the weights file and the content of ``config.json`` of a timm folder."""
    weights = next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    config_path = folder / "config.json"
    if not config_path.is_file():
        hint = (
            f"; it holds {weights.name}: give that file, and {option_name('model', 'NAME')}"
            if weights
            else ""
        )
        raise CheckpointError(f"{show(folder)}: is a directory without a timm config.json{hint}")
    if weights is None:
        if (folder / "model.safetensors.index.json").exists():
            raise CheckpointError(f"{show(folder)}: sharded weights are not supported; save them as one file")
        raise CheckpointError(
            f"{show(folder)}: holds no weights, expected model.safetensors beside config.json"
        )
    size = regular_size(config_path)
    if size > _MAX_CONFIG_BYTES:
        raise CheckpointError(f"{show(config_path)}: {size} bytes, expected at most {_MAX_CONFIG_BYTES}")
    try:
        text = config_path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{show(config_path)}: cannot be read: {error}") from None
    config = parse_json(text, show(config_path))
    if not isinstance(config, dict):
        raise CheckpointError(f"{show(config_path)}: expected an object, found {type(config).__name__}")
    return weights, config


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
