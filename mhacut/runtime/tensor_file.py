"""Write safetensors files; a disk that is full is an error of the system, as for any other file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mhacut.runtime.files import AnyPath

_SYSTEM_ERROR = re.compile(r"os error (\d+)")


def save_tensors(tensors: Mapping[str, Tensor], path: AnyPath, metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors; call it within :func:`mhacut.runtime.files.write_whole`.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        save_file(_apart(tensors), path, dict(metadata))
    except SafetensorError as error:
        found = _SYSTEM_ERROR.search(str(error))
        if found is None:
            raise OSError(str(error)) from error
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


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
