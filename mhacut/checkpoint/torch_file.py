"""Read torch checkpoints with ``weights_only=True``, which runs no code from the file.

Training checkpoints also hold options, NumPy numbers and paths. torch refuses a file with any of these, so
harmless stand-in classes are allowed for them.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhacut.checkpoint.header import DTYPES, FileHeader, TensorInfo
from mhacut.checkpoint.record import SAVE_SLIM_ADVICE
from mhacut.checkpoint.training import statements
from mhacut.checkpoint.wrapping import other_parts, pick_part
from mhacut.errors import CheckpointError
from mhacut.runtime.files import regular_size, show
from mhacut.text import dtype_name

_MAX_PICKLE_BYTES = 8 * 2**20
"""Largest pickle that is read. A training state of 10,000 tensors has a pickle of 2 MB."""
_STATE_DICT_ADVICE = "Save only the state dict: torch.save(model.state_dict(), FILE)"


class SkippedValue:
    """Stand-in for ignored values of a pickle: paths, NumPy numbers and factories of defaultdict."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _stand_ins() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    paths = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    unread = [f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in paths]
    unread += ["numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"]
    unread += [f"builtins.{name}" for name in ("list", "dict", "int", "float", "str", "bool")]
    return [
        argparse.Namespace,
        *((SkippedValue, name) for name in unread),
        (lambda *_: {}, "collections.defaultdict"),
        (OrderedDict, "yacs.config.CfgNode"),  # torch restores no other subclass of dict
    ]


def read_torch(path: Path, device: str = "cpu") -> Any:
    try:
        # An open file, since torch would go by the suffix of a path.
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles it then refuses; the refusal says it all
            if file.read(4) == b"PK\x03\x04":
                _check_archive(path)
            file.seek(0)
            with torch.serialization.safe_globals(_stand_ins()):
                return torch.load(file, map_location=device, weights_only=True)
    except (CheckpointError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{show(path)}: {_blocked(str(error))}") from None
    except Exception as error:  # a damaged file fails in any way
        raise _broken(path, error) from None


def read_whole(path: Path, device: str = "cpu") -> Any:
    """Load a torch file that mhacut wrote, after comparing the checksums of its archive."""
    regular_size(path)  # to open a pipe would block
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not compare the checksums
    except Exception as error:  # a damaged file fails in any way
        raise _broken(path, error) from None
    if damaged is not None:
        raise CheckpointError(f"{show(path)}: is damaged")
    return read_torch(path, device)


def torch_header(path: Path, requested_part: str | None = None) -> FileHeader:
    where = show(path)
    checkpoint = read_torch(path, "meta")
    # On the meta device a tensor has a shape and no memory, whatever the file claims.
    try:
        part, state_dict = pick_part(where, checkpoint, requested_part)
        tensors = {name: _info(where, name, tensor) for name, tensor in state_dict.items()}
        header = FileHeader(
            path,
            "torch",
            tensors,
            part=part,
            other_parts=other_parts(checkpoint, part),
            requested_part=requested_part,
            training=statements(checkpoint) if isinstance(checkpoint, dict) else {},
        )
    except CheckpointError:
        raise
    except Exception as error:  # attributes in a pickle may take the place of a dict's or a tensor's methods
        raise _broken(path, error) from None
    if not tensors:
        raise CheckpointError(f"{where}: holds no tensors. Give the file with the weights")
    return header


def torch_tensors(path: Path, requested_part: str | None, names: Collection[str]) -> dict[str, Tensor]:
    _, state_dict = pick_part(show(path), read_torch(path), requested_part)
    return {name: tensor for name, tensor in state_dict.items() if name in names}


def _info(where: str, name: object, tensor: object) -> TensorInfo:
    if not isinstance(name, str):
        raise CheckpointError(
            f"{where}: expected tensor names, found key {name!r:.100}. {_STATE_DICT_ADVICE}"
        )
    if not isinstance(tensor, Tensor):
        raise CheckpointError(
            f"{where}: {name!r:.200}: expected a tensor, found {type(tensor).__name__}. {_STATE_DICT_ADVICE}"
        )
    if tensor.layout != torch.strided or tensor.dtype not in DTYPES.values():
        kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
        raise CheckpointError(
            f"{where}: tensor {name!r:.200}: expected dense float values, found {dtype_name(kind)}. "
            "Save the weights as dense float tensors"
        )
    return TensorInfo(tuple(tensor.shape), tensor.dtype)


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    pickles = [member for member in members if member.filename.endswith("/data.pkl")]
    # torch compresses nothing, and compressed members may unpack to any size.
    compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if len(pickles) != 1 or compressed:
        raise CheckpointError(
            f"{show(path)}: not a PyTorch checkpoint: expected an uncompressed zip file with 1 data.pkl"
        )
    if pickles[0].file_size > _MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{show(path)}: a pickle is larger than {_MAX_PICKLE_BYTES} bytes. {_STATE_DICT_ADVICE}"
        )


def _broken(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return CheckpointError(
        f"{show(path)}: damaged, or not a PyTorch checkpoint of dense float tensors ({reason:.200})"
    )


def _blocked(reason: str) -> str:
    named = re.search(r"GLOBAL ([\w.]+)", reason)
    if named and named[1].startswith("mhacut."):
        return f"contains a pickled slim model, which is not loaded. {SAVE_SLIM_ADVICE}"
    objects = f" ({named[1]:.100})" if named else ""
    return (
        f"contains objects other than weights{objects}. They could run code, so nothing was loaded. If you "
        "trust the file: c = torch.load(FILE, weights_only=False); torch.save(c.state_dict(), "
        '"weights.pth"), or c["model"] of a training checkpoint'
    )
