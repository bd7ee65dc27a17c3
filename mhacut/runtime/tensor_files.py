"""Writing of safetensors files."""

from __future__ import annotations

from collections.abc import Mapping

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mhacut.runtime.files import AnyPath


def save_tensors(tensors: Mapping[str, Tensor], path: AnyPath, metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors. Call it inside :func:`mhacut.runtime.files.write_file`."""
    try:
        save_file(_unshared(tensors), path, dict(metadata))
    except SafetensorError as error:
        raise OSError(str(error)) from error  # for example, the disk is full


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory, which safetensors refuses."""
    # The first tensor of each storage is not copied: a copy of a large model may not fit into memory.
    unshared: dict[str, Tensor] = {}
    storages = set[int]()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        unshared[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return unshared
