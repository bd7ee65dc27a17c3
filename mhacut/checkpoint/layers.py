"""The numbers of one layer at a time, of a checkpoint whose weights were not read as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mhacut.checkpoint.files import read_tensors
from mhacut.checkpoint.load import Outline
from mhacut.checkpoint.recognise import as_timm_has_it
from mhacut.checkpoint.safetensors_file import safetensors_tensors
from mhacut.errors import CheckpointError
from mhacut.runtime.files import show


class LayerReader:
    """Fills layers of an outline's skeleton with the file's numbers, float32, and empties them again.

    A safetensors file under timm's names is read layer by layer, so that memory holds one of them; any other
    is read whole first.
    """

    def __init__(self, outline: Outline) -> None:
        self._outline = outline
        self._where = show(outline.header.path)
        names = set(outline.skeleton.state_dict())
        as_they_are = outline.header.format == "safetensors" and names <= set(outline.header.tensors)
        self._whole: Mapping[str, Tensor] | None = None
        if not as_they_are:
            self._whole = as_timm_has_it(read_tensors(outline.header), outline.skeleton)

    @contextmanager
    def layer(self, name: str) -> Iterator[nn.Module]:
        """The layer of that name, its parameters and buffers read; they are gone when the block ends.

        Raises:
            CheckpointError: they cannot be read, or are not all finite.
        """
        module = self._outline.skeleton.get_submodule(name)
        empty = module.state_dict(keep_vars=True)
        wanted = list(empty)
        read = self._read([f"{name}.{key}" for key in wanted])
        for key, tensor in read.items():
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(
                    f"{self._where}: tensor {key!r:.150} holds NaN or infinite values; the training that "
                    "made it diverged, take an earlier checkpoint, or ask for shapes alone with --shapes"
                )
        try:
            _assign(module, {key: read[f"{name}.{key}"] for key in wanted})
            yield module
        finally:
            _assign(module, empty)

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        if self._whole is not None:
            return {name: _wide(self._whole[name]) for name in names}
        tensors = safetensors_tensors(self._outline.header.path, names)
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
