"""Read checkpoint files. The content decides the format.

Files are untrusted: suffixes are ignored, no code is run, no archive is extracted, no path in a file is
followed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from mhacut.checkpoint.folder import MERGE_ADAPTER_ADVICE, open_folder
from mhacut.checkpoint.header import DTYPES, FileHeader, Format, TensorInfo, infos
from mhacut.checkpoint.record import METADATA_KEY
from mhacut.checkpoint.torch_file import torch_header, torch_tensors
from mhacut.checkpoint.wrapping import unwrap
from mhacut.errors import CheckpointError
from mhacut.runtime.files import regular_size, show

_OF_ADAPTER = re.compile(r"(^|\.)(lora_[AB](\.|$)|base_layer\.(weight|bias)$)")
_MAX_HEADER_BYTES = 100_000_000
_LFS_POINTER = b"version https://git-lfs"


def read_file_header(source: str | os.PathLike[str], part: str | None = None) -> FileHeader:
    path = Path(source)
    if not path.is_dir():
        return _named(_file_header(path, part))
    weights, config, preprocessor = open_folder(path)
    header = _file_header(weights[0], part) if len(weights) == 1 else _sharded_header(weights, part)
    return _named(dataclasses.replace(header, config=config, preprocessor=preprocessor))


def _file_header(path: Path, part: str | None = None) -> FileHeader:
    regular_size(path)  # opening a pipe would block
    if _sniff(path) == "safetensors":
        tensors, metadata = safetensors_header(path)
        return FileHeader(path, "safetensors", tensors, metadata, requested_part=part)
    return torch_header(path, part)


def _named(header: FileHeader) -> FileHeader:
    """Return ``header`` without tensors outside the model, and with wrapper prefixes removed from names."""
    of_timm = header.config is None or "architecture" in header.config
    if METADATA_KEY in header.metadata or not of_timm:
        return dataclasses.replace(header, names={name: name for name in header.tensors})
    requested_part = (
        None if header.requested_part in (header.part or "").split(".") else header.requested_part
    )
    parts = () if header.part is None else (header.part, *header.other_parts)
    names, note = unwrap(show(header.path), header.shapes, part=requested_part, parts=parts)
    adapter = next((file for file, name in names.items() if _OF_ADAPTER.search(name)), None)
    if adapter is not None:
        raise CheckpointError(
            f"{show(header.path)}: holds an adapter ({adapter!r:.150}). {MERGE_ADAPTER_ADVICE}"
        )
    tensors = {name: header.tensors[file] for file, name in names.items()}
    return dataclasses.replace(header, tensors=tensors, names=names, note=note)


def _sharded_header(paths: Sequence[Path], part: str | None) -> FileHeader:
    tensors: dict[str, TensorInfo] = {}
    headers = [_file_header(path) for path in paths]
    for header in headers:
        tensors |= header.tensors
    shards = {header.path: header.tensors for header in headers}
    return FileHeader(paths[0], headers[0].format, tensors, shards=shards, requested_part=part)


def read_tensors(header: FileHeader) -> dict[str, Tensor]:
    names = header.names
    tensors: dict[str, Tensor] = {}
    stored: Mapping[Path, Iterable[str]] = header.shards or {header.path: names}
    for path, inside in stored.items():
        wanted = [name for name in inside if name in names]
        if header.format == "safetensors":
            tensors |= read_safetensors(path, wanted)
        else:
            tensors |= torch_tensors(
                path, None if header.shards else header.requested_part, frozenset(wanted)
            )
    tensors = {names[name]: tensor for name, tensor in tensors.items()}
    # The header was compared with the model. The file may have been replaced since.
    if infos(tensors) != dict(header.tensors):
        raise CheckpointError(f"{show(header.path)}: changed while it was read. Try again")
    return tensors


def read_safetensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except Exception as error:  # the library's own types
        raise CheckpointError(f"{show(path)}: cannot be read: {error!s:.200}") from None


def safetensors_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return the shape and dtype of each tensor, and the metadata of the file."""
    regular_size(path)  # opening a pipe would block
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            announced = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except Exception as error:  # the library's own types
        reason = ascii(str(error).removeprefix("Error while deserializing header: "))[1:-1]
        raise CheckpointError(
            f"{show(path)}: truncated or damaged ({reason:.200}). Download or copy it again"
        ) from None
    if not announced:
        raise CheckpointError(f"{show(path)}: holds no tensors. Give the file with the weights")
    for name, (dtype, _) in announced.items():
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{show(path)}: tensor {name!r:.200}: expected float values, found {dtype}. "
                "Save the weights as dense float tensors"
            )
    return {name: TensorInfo(shape, DTYPES[dtype]) for name, (dtype, shape) in announced.items()}, metadata


def sha256_of_file(header: FileHeader) -> str:
    """Return the SHA-256 of a checkpoint file. For shards, it is the SHA-256 of all shards' digests."""
    if not header.shards:
        return sha256_of(header.path)
    return hashlib.sha256("".join(map(sha256_of, header.shards)).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _sniff(path: Path) -> Format:
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{show(path)}: cannot be opened: {error.strerror}") from None
    # safetensors first: the length of a header may look like the first bytes of any other format.
    header_bytes = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and header_bytes <= _MAX_HEADER_BYTES:
        return "safetensors"
    if re.match(rb"PK\x03\x04|PK\x05\x06|\x80[\x02-\x05]", start):
        return "torch"
    is_pointer = start.startswith(_LFS_POINTER)
    advice = "This is a Git LFS pointer: run git lfs pull" if is_pointer else "Give the file with the weights"
    raise CheckpointError(
        f"{show(path)}: not a safetensors or PyTorch checkpoint: begins with {start[:16]!r}. {advice}"
    )
