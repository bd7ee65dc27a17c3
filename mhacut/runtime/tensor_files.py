"""Tensors in files: large ones in temporary files mapped into memory, and those of safetensors files."""

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

LEAST_BYTES = 2**20
"""Smaller tensors stay in memory."""


class Spill:
    """Tensors in unnamed files, each of which is deleted with its tensor.

    The files lie where ``TMPDIR`` says. On a disk, the system writes their pages back and frees them when it
    needs memory; in a ``tmpfs``, this saves no memory. Freed pages are read again when used.
    """

    def __init__(self) -> None:
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a copy of ``tensor`` in a file, or the tensor if it is small or the disk is full."""
        # Every mapping takes whole pages, and there is a limit on their number.
        if tensor.nbytes < LEAST_BYTES or not hasattr(os, "posix_fallocate"):
            return tensor
        try:
            # Without a name: the system frees it whenever and however this process ends.
            with tempfile.TemporaryFile() as file:
                # Reserved: writing to a page for which the disk has no room would end the process.
                os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
                mapped = mmap.mmap(file.fileno(), tensor.nbytes)
        except OSError:
            return tensor
        self._maps.add(mapped)
        return torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)

    def drop(self) -> None:
        """Release all pages from this process's memory; their content stays in the files."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)


def return_freed() -> None:
    """Return freed memory to the system, much of which glibc keeps when layers are large."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def save_tensors(tensors: Mapping[str, Tensor], path: AnyPath, metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors; call it within :func:`mhacut.runtime.files.write_file`."""
    try:
        save_file(_apart(tensors), path, dict(metadata))
    except SafetensorError as error:
        raise OSError(str(error)) from error  # the disk is full, for one


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with copies in place of those that share memory, which the library refuses.

    Of those in one storage, all but the first are copied: a copy of a large model may not fit into memory.
    """
    apart: dict[str, Tensor] = {}
    storages = set[int]()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return apart
