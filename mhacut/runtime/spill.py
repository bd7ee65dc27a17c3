"""Large tensors in temporary files that are mapped into memory."""

from __future__ import annotations

import mmap
import os
import tempfile

import torch
from torch import Tensor

LEAST_BYTES = 2**20
"""Smaller tensors stay in memory."""


class Spill:
    """Tensors in files without a name, each gone with its tensor; they lie where ``TMPDIR`` says.

    Pages of mapped files are no burden: the system writes them back and takes them away when it needs memory.
    Those that were dropped are read again when they are used.
    """

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a copy of ``tensor``, on the CPU, in a file; itself if it is small or the disk is full."""
        if tensor.nbytes < LEAST_BYTES:
            return tensor
        try:
            with tempfile.TemporaryFile() as file:
                _reserve(file.fileno(), tensor.nbytes)
                mapped = mmap.mmap(file.fileno(), tensor.nbytes)
        except OSError:
            return tensor
        self._maps.append(mapped)
        return torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)

    def drop(self) -> None:
        """Take all pages out of this process; their content stays."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)


def _reserve(file: int, length: int) -> None:
    """Reserve space: writing to a mapped page for which the disk has no room would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, length)
    else:
        os.truncate(file, length)
