"""Large tensors in temporary files that are mapped into memory, and writing of safetensors files."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import weakref
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mhacut.runtime.files import AnyPath

MIN_BYTES = 2**20
"""Size below which a tensor stays in memory."""


class Spill:
    """Tensors in unnamed temporary files (``TMPDIR``). A file is deleted with its tensor.

    The system can free the memory of such tensors, and reads them again on use. A ``tmpfs`` saves no memory.
    """

    def __init__(self) -> None:
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a copy of ``tensor`` in a file, or the tensor if it is small or the disk is full."""
        # Small tensors would waste pages, and the system limits the number of mappings.
        if tensor.nbytes < MIN_BYTES or not hasattr(os, "posix_fallocate"):
            return tensor
        try:
            # The file has no name, so the system frees it even if this process is killed.
            with tempfile.TemporaryFile() as file:
                # Reserved now: on a full disk, a later write to a page would kill the process.
                os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
                mapped = mmap.mmap(file.fileno(), tensor.nbytes)
        except OSError:
            return tensor
        self._maps.add(mapped)
        return torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)

    def drop(self) -> None:
        """Release the memory of all tensors. Their content stays in the files."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)


def return_freed() -> None:
    """Return freed memory to the system. glibc keeps much of it when layers are large."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def save_tensors(tensors: Mapping[str, Tensor], path: AnyPath, metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors. Call it inside :func:`mhacut.runtime.files.write_file`."""
    try:
        save_file(_unshared(tensors), path, dict(metadata))
    except SafetensorError as error:
        raise OSError(str(error)) from error  # for example, the disk is full


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without shared memory, which safetensors refuses."""
    # The first tensor of each storage is not copied: a copy of a large model may not fit into memory.
    unshared: dict[str, Tensor] = {}
    storages = set[int]()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        unshared[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return unshared
