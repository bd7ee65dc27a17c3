"""Bounds on the zip archives that ``torch.save`` writes; nothing is ever extracted."""

from __future__ import annotations

import re
import struct
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mhacut.checkpoint import pickle_bounds
from mhacut.errors import CheckpointError
from mhacut.runtime.files import show

_END = struct.Struct("<4s8xLLH")
"""End of an archive: signature; length and start of the directory; length of a comment."""
_LOCATOR = struct.Struct("<4s4xQ4x")
"""Before it in a large archive: signature; where the end of large archives is."""
_LARGE_END = struct.Struct("<4s36xQQ")
"""Before that the end of large archives: signature; length and start of the directory."""


def is_zip(path: Path) -> bool:
    """Whether a file is, or says it is, a zip archive: by its first bytes, or a directory at its end."""
    with open(path, "rb") as file:
        if file.read(2) == b"PK":
            return True
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # a directory, and a part of several disks
        return True


def check_zip(path: Path, size: int) -> None:
    """Refuse archives that are not a state dict's, or that would inflate; nothing is ever extracted."""
    where = show(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{where}: truncated, or not a torch checkpoint ({error}); download or copy it again"
        ) from None
    names = [member.filename for member in members]
    if any(re.search(r"(^|/)constants\.pkl$|(^|/)code/", name) for name in names):
        raise CheckpointError(
            f"{where}: TorchScript archives are not supported; save the state dict: "
            "torch.save(torch.jit.load(FILE).state_dict(), ...)"
        )
    pickles = [member for member in members if re.fullmatch(r"[^/]+/data\.pkl", member.filename)]
    if names and all(name.endswith(".npy") for name in names):
        raise CheckpointError(
            f"{where}: a NumPy archive (.npz), not a torch checkpoint; timm converts those of its models: "
            'm = timm.create_model(NAME, checkpoint_path=FILE); torch.save(m.state_dict(), "weights.pth")'
        )
    if len(pickles) != 1:
        raise CheckpointError(f"{where}: a zip file, but not a torch checkpoint (no data.pkl inside)")
    deflated = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    unpacked = sum(member.file_size for member in members)
    if deflated or unpacked > size:
        raise CheckpointError(
            f"{where}: compressed torch files are not supported (torch writes none): {unpacked} bytes "
            f"unpacked from {size}; save the state dict again with torch.save"
        )
    if pickles[0].file_size > pickle_bounds.MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{where}: its pickle has {pickles[0].file_size} bytes, expected at most "
            f"{pickle_bounds.MAX_PICKLE_BYTES}; save the state dict alone: "
            "torch.save(model.state_dict(), ...)"
        )
    _check_directory(path, size)
    with open(path, "rb") as file, suppress(RuntimeError, UnicodeDecodeError):  # which loading will meet, too
        reader = torch._C.PyTorchFileReader(file)
        _check_byte_order(where, reader)
        pickle_bounds.check_pickles(where, reader.get_record("data.pkl"))


def _check_byte_order(where: str, reader: Any) -> None:
    """Refuse numbers whose bytes torch would swap, which ends the process on the meta device."""
    order = reader.get_record("byteorder") if reader.has_record("byteorder") else b""
    if order not in (b"", sys.byteorder.encode()):
        raise CheckpointError(
            f"{where}: its numbers are {order[:20].decode(errors='replace')!r}-endian, this machine's are "
            f"{sys.byteorder!r}; save it again: torch.save(torch.load(FILE, weights_only=True), ...)"
        )


def _check_directory(path: Path, size: int) -> None:
    """Refuse an archive whose directory is not where its end says, right before it.

    Python looks for it before the end and PyTorch where the end says, so that they would see other members.
    """
    with open(path, "rb") as file:
        file.seek(max(0, size - _END.size - _LOCATOR.size - _LARGE_END.size))
        tail = file.read()
    signature, length, start, comment = _END.unpack(tail[-_END.size :])
    before, close = size - _END.size, signature == b"PK\x05\x06" and comment == 0
    locator = tail[: -_END.size][-_LOCATOR.size :]
    if len(tail) == _END.size + _LOCATOR.size + _LARGE_END.size and locator[:4] == b"PK\x06\x07":
        _, at = _LOCATOR.unpack(locator)
        large, large_length, large_start = _LARGE_END.unpack(tail[: _LARGE_END.size])
        before = size - len(tail)
        close &= large == b"PK\x06\x06" and at == before
        close &= length in (large_length, 2**32 - 1) and start in (large_start, 2**32 - 1)
        length, start = large_length, large_start
    if not close or start + length != before:
        raise CheckpointError(
            f"{show(path)}: the directory of this zip file is not where its end says; save the state dict "
            "again with torch.save"
        )


def loads_as_zip(path: Path) -> bool:
    """Whether PyTorch takes a file for a zip archive; others are pickles to it."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"
