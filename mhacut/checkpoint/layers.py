"""Read the weights of one layer at a time, of a checkpoint whose weights were not read as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.files import read_safetensors
from mhacut.errors import CheckpointError, option_name
from mhacut.runtime.files import show


class LayerReader:
    """Reader that fills layers of a checkpoint's skeleton with weights, float32, and empties them again.

    A safetensors file with the model's names is read layer by layer, so that memory holds one of them; any
    other file is read whole first.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Prepare to read a checkpoint that has a file and no weights yet."""
        header = checkpoint.header
        assert header is not None
        self._skeleton = checkpoint.skeleton
        self._path = header.path
        names = header.naming.names
        same_names = all(names.get(name) == name for name in self._skeleton.state_dict())
        self._whole: Mapping[str, Tensor] | None = None
        if header.format != "safetensors" or header.shards or not same_names:
            self._whole = checkpoint.read_tensors()

    @contextmanager
    def layer(self, name: str) -> Iterator[nn.Module]:
        """Read the parameters and buffers of a layer; they are gone when the ``with`` block ends.

        Raises:
            CheckpointError: they cannot be read, or are not all finite.
        """
        module = self._skeleton.get_submodule(name)
        empty = module.state_dict(keep_vars=True)
        wanted = list(empty)
        read = self._read([f"{name}.{key}" for key in wanted])
        for key, tensor in read.items():
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(
                    f"{show(self._path)}: tensor {key!r:.150} holds NaN or infinite values; the training "
                    "that made it diverged; use an earlier checkpoint, or show shapes alone with "
                    f"{option_name('shapes', True)}"
                )
        try:
            _assign(module, {key: read[f"{name}.{key}"] for key in wanted})
            yield module
        finally:
            _assign(module, empty)

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        if self._whole is not None:
            return {name: _wide(self._whole[name]) for name in names}
        tensors = read_safetensors(self._path, names)
        return {name: _wide(tensor) for name, tensor in tensors.items()}


def _assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        owner_name, _, name = key.rpartition(".")
        owner = module.get_submodule(owner_name)
        if name in owner._buffers:
            owner._buffers[name] = tensor
        else:
            owner.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
