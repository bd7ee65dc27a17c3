"""Read torch files with a yacs configuration beside the weights, without yacs and without running code.

The training scripts of Swin, and of what grew from them, save ``{"model": ..., "config": CfgNode, ...}``.
PyTorch's safe unpickler refuses it, and no allow-list helps: it fills no subclass of dict. The reader here is
as strict: it knows a few names, none of which can run code from the file. A configuration becomes a dict.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mhacut.checkpoint import inert
from mhacut.errors import CheckpointError

_CONFIG = ("yacs.config", "CfgNode")
_SETS = ("builtins.set", "__builtin__.set")


class YacsConfig(dict[Any, Any]):
    """Entries of a ``CfgNode``, without its behaviour."""

    def __setstate__(self, state: object) -> None:
        """Drop the attributes of the original."""


def is_only_obstacle(path: Path) -> bool:
    """Whether a yacs configuration is all that keeps PyTorch's safe unpickler from the file at ``path``."""
    try:
        with open(path, "rb") as file:
            # Legacy files and bare pickles cannot be listed, and are left refused.
            names = set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # broken pickles fail in every way
        return False
    return ".".join(_CONFIG) in names and names <= {".".join(_CONFIG), *_SETS, *inert.NAMES}


def load(path: Path, device: str) -> Any:
    """Load the torch file at ``path``, configurations as :class:`YacsConfig`.

    Raises:
        CheckpointError: it names anything but tensors, plain containers and configurations.
        Exception: of any type, for a broken file.
    """
    with open(path, "rb") as file:
        return torch.load(file, map_location=device, pickle_module=_pickle_module(), weights_only=False)


def holds_config(checkpoint: object) -> bool:
    """Whether a checkpoint has a yacs configuration under ``config``."""
    return isinstance(checkpoint, dict) and isinstance(checkpoint.get("config"), YacsConfig)


def _pickle_module() -> Any:
    """Return a substitute for :mod:`pickle` whose unpickler knows a handful of names.

    They are made afresh for each file: a pickle may set attributes on what it names, and must reach nothing
    that outlives it. Storages never come here, PyTorch resolves those names itself.
    """

    class Config(YacsConfig):
        pass

    class Ordered(OrderedDict[Any, Any]):
        pass

    class Set(set[Any]):
        pass

    def tensor(storage: Any, offset: int, size: Any, stride: Any, requires_grad: bool, *_: object) -> Tensor:
        rebuild: Any = torch._utils._rebuild_tensor_v2
        made: Tensor = rebuild(storage, offset, size, stride, requires_grad, OrderedDict())
        return made

    def parameter(data: Tensor, requires_grad: bool, *_: object) -> Tensor:
        rebuild: Any = torch._utils._rebuild_parameter
        made: Tensor = rebuild(data, requires_grad, OrderedDict())
        return made

    def encode(text: str, *_: object) -> bytes:  # as protocol 2 spells the bytes of a number of numpy
        return str.encode(text, "latin1")

    known: dict[tuple[str, str], Any] = {
        **inert.stand_ins(),
        ("_codecs", "encode"): encode,
        _CONFIG: Config,
        ("collections", "OrderedDict"): Ordered,
        ("builtins", "set"): Set,
        ("__builtin__", "set"): Set,  # as Python 2, and protocol 2, spell it
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_parameter"): parameter,
    }

    class Unpickler(pickle.Unpickler):
        def find_class(self, module_name: str, global_name: str, /) -> Any:
            found = known.get((module_name, global_name))
            if found is None:
                raise CheckpointError(f"{module_name}.{global_name} is no part of a state dict")
            return found

    def refuse(*_: object, **__: object) -> None:
        raise CheckpointError("a torch file older than 1.6; save it again with a newer torch")

    return SimpleNamespace(Unpickler=Unpickler, load=refuse, __name__="mhacut's unpickler")
