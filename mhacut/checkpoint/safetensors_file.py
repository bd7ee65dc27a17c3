"""Read safetensors headers, every claim checked against the size of the file."""

from __future__ import annotations

import re
import struct
from pathlib import Path

from mhacut.checkpoint.header import DTYPES, TensorInfo
from mhacut.checkpoint.untrusted_json import parse_json
from mhacut.errors import CheckpointError
from mhacut.runtime.files import show

_MAX_TENSORS = 100_000
"""The largest model of timm has about 3,000."""


_REFUSED_DTYPE = re.compile(r"C\d+|F8.*|F4.*|F6.*|U\d+")


def safetensors_header(path: Path, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a safetensors file, every claim of its header checked against its size."""
    where = show(path)
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise CheckpointError(
                f"{where}: truncated: the header says {length} bytes, the file has {size - 8} after "
                "its first 8; download or copy it again"
            )
        raw = file.read(length)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: the safetensors header is not UTF-8 ({error.reason})") from None
    document = parse_json(text, f"{where}: safetensors header")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__ of a safetensors file maps text to text")
    if len(document) > _MAX_TENSORS:
        raise CheckpointError(f"{where}: {len(document)} tensors, expected at most {_MAX_TENSORS}")
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in document.items():
        tensors[name], begin, end = _tensor_entry(where, name, entry)
        spans.append((begin, end, name))
    expected = 0
    for begin, end, name in sorted(spans):
        if begin != expected:
            problem = "overlaps the one before" if begin < expected else "leaves a hole before it"
            raise CheckpointError(
                f"{where}: tensor {name!r:.200} {problem} (starts at {begin}, expected {expected})"
            )
        expected = end
    found = size - 8 - length
    if found < expected:
        raise CheckpointError(
            f"{where}: truncated: {found} of {expected} bytes of weights; download or copy it again"
        )
    if found > expected:
        raise CheckpointError(f"{where}: {found - expected} unexpected bytes after the last tensor")
    if not tensors:
        raise CheckpointError(f"{where}: holds no tensors")
    return tensors, metadata


def _tensor_entry(where: str, name: str, entry: object) -> tuple[TensorInfo, int, int]:
    what = f"{where}: tensor {name!r:.200}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{what}: a header entry has exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not all(_is_size(n) for n in shape) or len(shape) > 16:
        raise CheckpointError(f"{what}: shape is a short list of sizes, found {shape!r:.100}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise CheckpointError(f"{what}: data_offsets is begin and end, found {offsets!r:.100}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        if isinstance(dtype, str) and _REFUSED_DTYPE.fullmatch(dtype):
            raise CheckpointError(
                f"{what}: quantised or complex weights are not supported, "
                f"found {dtype}, expected a float dtype"
            )
        raise CheckpointError(f"{what}: unknown dtype {dtype!r:.50}")
    torch_dtype, item_bytes = DTYPES[dtype]
    nbytes = item_bytes
    for n in shape:
        nbytes *= n
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{what}: shape {shape} of {dtype} is {nbytes} bytes, data_offsets span {offsets[1] - offsets[0]}"
        )
    return TensorInfo(tuple(shape), torch_dtype), offsets[0], offsets[1]


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
