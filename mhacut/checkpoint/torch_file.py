"""Read torch checkpoints without running code from them."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, suppress
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhacut.checkpoint import inert, pickle_bounds, yacs
from mhacut.checkpoint.header import DTYPES, FileHeader, TensorInfo
from mhacut.checkpoint.parts import other_parts, pick_part
from mhacut.checkpoint.torch_archive import check_zip, is_zip, loads_as_zip
from mhacut.checkpoint.training import statements
from mhacut.checkpoint.untrusted_json import shown
from mhacut.errors import CheckpointError
from mhacut.runtime.files import regular_size, show
from mhacut.text import dtype_name

_LEGACY_NUMBER = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
"""Bytes of the number that a file of torch before 1.6 begins with, in its first pickle."""
_PICKLES_OF_LEGACY = 5
"""Number of pickles that a file of torch before 1.6 begins with."""
_MAX_TIMES_CLAIMED = 16
"""Number of times that the tensors of a file, which may share storages, may claim its bytes."""
_MAX_LISTED_BYTES = 4 * 2**20
"""Number of bytes of a refused pickle that are searched for names."""
_ARRAYS = (
    "numpy arrays in a pickle (as detectron2's .pkl), not a torch checkpoint. If you trust its source, "
    'convert it where it can do no harm: c = pickle.load(open(FILE, "rb"), encoding="latin1"); '
    'torch.save({k: torch.from_numpy(v) for k, v in c["model"].items()}, "weights.pth") (or c itself)'
)
"""What is said of a pickle without torch's storages."""


def torch_header(path: Path, size: int, asked: str | None = None) -> FileHeader:
    """Return the header of a torch file, from its pickle alone: storages go to the meta device unread.

    Tensors have their names in the file.

    Args:
        path: the file.
        size: its size in bytes.
        asked: part of the checkpoint that the user wants, an entry or a module in it.
    """
    where = show(path)
    if is_zip(path):
        check_zip(path, size)
    if not loads_as_zip(path):
        _check_legacy(path, size)
    checkpoint = _torch_load(path, "meta")
    part, state_dict = pick_part(where, checkpoint, asked)
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in state_dict.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{where}: expected tensor names, found key {shown(name):.100}")
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{where}: {name!r:.200} is a {type(tensor).__name__}, expected a tensor; "
                "save the state dict alone: torch.save(model.state_dict(), ...)"
            )
        if tensor.layout != torch.strided or tensor.dtype not in DTYPES.values():
            kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
            raise CheckpointError(
                f"{where}: tensor {name!r:.200}: quantised, sparse or complex weights are not supported, "
                f"found {dtype_name(kind)}, expected a dense tensor of a float dtype"
            )
        if tensor.numel() * tensor.element_size() > size:
            raise CheckpointError(
                f"{where}: tensor {name!r:.200} claims {tensor.numel() * tensor.element_size()} bytes, "
                f"the whole file has {size}"
            )
        tensors[name] = TensorInfo(tuple(tensor.shape), tensor.dtype)
    if not tensors:
        raise CheckpointError(f"{where}: holds no tensors")
    claimed = sum(prod(info.shape) * info.dtype.itemsize for info in tensors.values())
    if claimed > _MAX_TIMES_CLAIMED * size:
        raise CheckpointError(f"{where}: its tensors claim {claimed} bytes, the whole file has {size}")
    return FileHeader(
        path,
        "torch",
        tensors,
        part=part,
        other_parts=other_parts(checkpoint, part),
        asked=asked,
        training=statements(checkpoint) if isinstance(checkpoint, dict) else {},
    )


def _check_legacy(path: Path, size: int) -> None:
    """Refuse a file that is no zip archive if its pickles, which are read as one, are or make too much.

    They are followed opcode by opcode, without running them.
    """
    with open(path, "rb") as file:
        start = file.read(pickle_bounds.MAX_PICKLE_BYTES)
    if size > pickle_bounds.MAX_PICKLE_BYTES:
        _check_end(path, io.BytesIO(start))
    pickle_bounds.check_pickles(show(path), start, _PICKLES_OF_LEGACY)


def _check_end(path: Path, start: io.BytesIO) -> None:
    """Refuse a file whose pickles do not end within ``start``."""
    import pickletools

    with suppress(Exception):  # a broken pickle fails in every way, here as when it is loaded
        for _ in range(_PICKLES_OF_LEGACY):
            for _ in pickletools.genops(start):
                pass
    if start.tell() >= pickle_bounds.MAX_PICKLE_BYTES:
        if _holds_arrays(path):
            raise CheckpointError(f"{show(path)}: {_ARRAYS}")
        raise CheckpointError(
            f"{show(path)}: its pickles have too many bytes, expected at most "
            f"{pickle_bounds.MAX_PICKLE_BYTES}; save the state dict alone: "
            "torch.save(model.state_dict(), ...)"
        )


def _torch_load(path: Path, device: str) -> Any:
    """Call ``torch.load`` as timm's loader does: weights only, ``argparse.Namespace`` allowed.

    The only other things allowed are those of :mod:`mhacut.checkpoint.inert`, and a yacs configuration, which
    has a strict reader of its own.
    """
    import pickle

    where = show(path)
    try:
        # An open file, since torch too would go by the suffix of a path.
        with (
            _allowed(),
            open(path, "rb") as file,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # about pickles it then refuses; the refusal says it all
            loaded = torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        if not yacs.is_only_obstacle(path):
            raise CheckpointError(f"{where}: {_blocked(path, str(error))}") from None
        loaded = _with_config(path, device)
    except Exception as error:  # a hostile pickle may fail in any way; none of them is a fault of mhacut
        raise _broken(where, error) from None
    _check_attributes(where, loaded)
    return loaded


def _with_config(path: Path, device: str) -> Any:
    try:
        return yacs.load(path, device)
    except Exception as error:  # as above
        raise _broken(show(path), error) from None


def _check_attributes(where: str, loaded: object) -> None:
    """Refuse values that were given an attribute in the place of a method: nothing of these would work.

    Raises:
        CheckpointError: there is one.
    """
    known: dict[type, frozenset[str]] = {}
    for value in {id(each): each for each in leaves(loaded, containers=True)}.values():
        given = {} if isinstance(value, type) else getattr(value, "__dict__", {})
        if given and type(value) not in known:
            known[type(value)] = frozenset().union(*(vars(base) for base in type(value).__mro__))
        for name in given:
            if name in known[type(value)]:
                raise CheckpointError(
                    f"{where}: a {type(value).__name__} in it has an attribute {name!r:.50} in the place of "
                    "its own; save the state dict alone: torch.save(model.state_dict(), ...)"
                )


def _allowed() -> AbstractContextManager[None]:
    """Return the context in which PyTorch's safe unpickler knows a few names more."""
    import argparse

    found = [(stand_in, ".".join(name)) for name, stand_in in inert.stand_ins().items()]
    return torch.serialization.safe_globals([argparse.Namespace, *found])


def _broken(where: str, error: Exception) -> CheckpointError:
    # torch 2.15 looks into sparse tensors, which are not there to be seen.
    if isinstance(error, NotImplementedError) and "meta tensor" in str(error):
        return CheckpointError(
            f"{where}: quantised, sparse or complex weights are not supported; save them dense (to_dense())"
        )
    if isinstance(error, RuntimeError) and "affine_quantized" in str(error):  # as quantize_dynamic makes them
        return CheckpointError(
            f"{where}: quantized weights are not supported, expected float ones; give the checkpoint from "
            "before quantization"
        )
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return CheckpointError(
        f"{where}: truncated, or not a torch checkpoint ({reason:.200}); download or copy it again"
    )


def _blocked(path: Path, reason: str) -> str:
    """Return why the safe unpickler stopped, and what to do about it."""
    if not is_zip(path) and _holds_arrays(path):
        return _ARRAYS
    try:
        with _allowed(), open(path, "rb") as file:
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # legacy files and bare pickles cannot be listed
        names = re.findall(r"GLOBAL ([\w.]+)", reason)[:1] or _globals_of_pickle(path)
    if not names:
        return (
            "a pickle, but none that torch loads safely: of protocol 4, or damaged; nothing was run. If you "
            "trust its source, save it again where it can do no harm: "
            f'torch.save({_loader_of(path)}, "weights.pth")'
        )
    listed = ", ".join(repr(name)[1:-1] for name in names[:5]) + (", ..." if len(names) > 5 else "")
    convert = (
        "If you trust its source, convert it where it can do no harm: "
        f'c = {_loader_of(path)}; torch.save(c.state_dict(), "weights.pth") '
        '(or c["state_dict"], c["model"])'
    )
    if any(name.startswith("numpy") for name in names) and all(
        name.startswith(("numpy", "_codecs")) for name in names
    ):
        return (
            f"contains numpy arrays beside the weights ({listed}), and loading them could run code; save "
            f"them as x.tolist(), or the state dict alone. {convert}"
        )
    return (
        f"contains a pickled model or other objects, not a state dict ({listed}); nothing was run. {convert}"
    )


def _loader_of(path: Path) -> str:
    """Code that loads ``FILE`` if anything does; ``torch.load`` reads no bare pickles."""
    with open(path, "rb") as file:
        by_torch = is_zip(path) or _LEGACY_NUMBER in file.read(40)
    return "torch.load(FILE, weights_only=False)" if by_torch else 'pickle.load(open(FILE, "rb"))'


def _holds_arrays(path: Path) -> bool:
    """Whether a bare pickle makes arrays of numpy; the first one of a torch file is a number."""
    makers = ("._reconstruct", "._frombuffer")
    return any(name.startswith("numpy") and name.endswith(makers) for name in _globals_of_pickle(path))


def _globals_of_pickle(path: Path) -> list[str]:
    """Return the names a bare pickle would import, read from its opcodes without running them."""
    import pickletools

    names: list[str] = []
    texts: list[str] = []
    with open(path, "rb") as file, suppress(Exception):  # broken pickles fail in every way
        for opcode, argument, _ in pickletools.genops(file.read(_MAX_LISTED_BYTES)):
            if opcode.name == "GLOBAL":
                names.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                names.append(".".join(texts[-2:]))
            elif isinstance(argument, str):
                texts.append(argument)
    return names


def torch_tensors(path: Path, asked: str | None, names: Collection[str]) -> dict[str, Tensor]:
    """Read the tensors of these names, on the CPU, in the file's dtypes.

    Args:
        path: the file.
        asked: part of the checkpoint, as for :func:`torch_header`.
        names: names in the file.

    Raises:
        CheckpointError: the file cannot be read, or lacks one of them.
    """
    where = show(path)
    _, state_dict = pick_part(where, _torch_load(path, "cpu"), asked)
    found = {name: tensor for name, tensor in state_dict.items() if name in names}
    if len(found) != len(names) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise CheckpointError(f"{where}: changed while it was read; try again")
    return found


def load_plain(path: Path) -> Any:
    """Load a file that mhacut itself made by ``torch.save``: tensors and plain values, on the CPU.

    The bounds are those of checkpoints, and no code in the file is run.

    Raises:
        CheckpointError: it is no such file, or its tensors claim far more bytes than it has.
        OSError: it cannot be read.
    """
    where, size = show(path), regular_size(path)
    if not loads_as_zip(path):
        raise CheckpointError(f"{where}: not a zip archive, which torch.save writes")
    check_zip(path, size)
    found = [leaf for leaf in leaves(_plain_load(path, "meta")) if isinstance(leaf, Tensor)]
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in found)
    if claimed > _MAX_TIMES_CLAIMED * size:
        raise CheckpointError(f"{where}: its tensors claim {claimed} bytes, the whole file has {size}")
    return _plain_load(path, "cpu")


def _plain_load(path: Path, device: str) -> Any:
    try:
        # An open file, since torch would go by the suffix of a path.
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(file, map_location=device, weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged zip or a hostile pickle fails in many ways
        blocked = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"{type(error).__name__}: {str(error).partition('. ')[0]:.100}"
        reason = f"it names {blocked[1]:.100}, which was not run" if blocked else reason
        raise CheckpointError(f"{show(path)}: {reason}") from None
    _check_attributes(show(path), loaded)
    return loaded


def leaves(value: object, *, containers: bool = False) -> Iterator[object]:
    """Everything in dicts, lists, tuples and sets, each of which is looked at once.

    Args:
        value: what to look into.
        containers: give these, too.
    """
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if not isinstance(each, dict | list | tuple | set):
            yield each
        elif id(each) not in seen:
            seen.add(id(each))
            waiting += dict.values(each) if isinstance(each, dict) else each
            if containers:
                yield each
