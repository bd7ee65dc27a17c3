"""Files as they lie on disk: what format the content is, what tensors it holds, and the tensors themselves.

Nothing here trusts a suffix, runs code from a file, extracts an archive, or follows a name found in a file.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mhacut.checkpoint import yacs
from mhacut.checkpoint.record import parse_json
from mhacut.errors import CheckpointError

Format = Literal["safetensors", "torch"]

_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
_MAX_TENSORS = 100_000
"""The largest model of timm has about 3,000."""
_MAX_PICKLE_BYTES = 256 * 2**20
_MAX_CONFIG_BYTES = 4 * 2**20
_WEIGHT_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "model.pth",
    "model.pt",
)

_DTYPES: dict[str, tuple[torch.dtype, int]] = {
    "F64": (torch.float64, 8),
    "F32": (torch.float32, 4),
    "F16": (torch.float16, 2),
    "BF16": (torch.bfloat16, 2),
    "I64": (torch.int64, 8),
    "I32": (torch.int32, 4),
    "I16": (torch.int16, 2),
    "I8": (torch.int8, 1),
    "U8": (torch.uint8, 1),
    "BOOL": (torch.bool, 1),
}
FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PLAIN_DTYPES = tuple(dtype for dtype, _ in _DTYPES.values())
_REFUSED_DTYPE = re.compile(r"C\d+|F8.*|F4.*|F6.*|U\d+")
_EMA_FIRST = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Parts of a training checkpoint in the order timm's loader prefers them."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the file announces it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class FileHeader:
    """What a checkpoint holds, known without reading its weights."""

    path: Path
    """The file with the weights."""
    format: Format
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of a safetensors file; untrusted text."""
    config: Mapping[str, Any] | None = None
    """The ``config.json`` of a timm folder; untrusted."""
    part: str | None = None
    """Which part of a training checkpoint the tensors are (``model_ema``), as timm picks it."""
    prefix_stripped: bool = False
    """Names carried ``module.`` or ``_orig_mod.`` of a wrapper."""
    has_yacs_config: bool = False
    """A training checkpoint with a yacs configuration beside the weights, as those of Swin have."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Per tensor name."""
        return {name: info.shape for name, info in self.tensors.items()}


def read_file_header(source: str | os.PathLike[str]) -> FileHeader:
    """What the checkpoint at ``source`` holds: a safetensors or torch file, or a timm folder.

    Raises:
        CheckpointError: it is not a readable checkpoint; the message says what it looks like instead.
    """
    path = Path(source)
    config = None
    if _is_directory(path):
        path, config = _open_folder(path)
    size = _check_regular(path)
    if _sniff(path, size) == "safetensors":
        tensors, metadata = _safetensors_header(path, size)
        return FileHeader(path, "safetensors", tensors, metadata, config)
    return _torch_header(path, size, config)


def read_tensors(header: FileHeader) -> dict[str, Tensor]:
    """The tensors ``header`` announced, on the CPU, in the file's dtypes.

    Raises:
        CheckpointError: the file cannot be read, or is no longer what the header said.
    """
    if header.format == "safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(header.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in header.tensors}
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{show(header.path)}: cannot be read: {error}") from error
    else:
        tensors = _torch_tensors(header)
    found = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if found != dict(header.tensors):
        raise CheckpointError(f"{show(header.path)}: changed while it was read; try again")
    return tensors


def sha256_of(path: Path) -> str:
    """Hex digest of the file's bytes."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _sha256(file)
        )


def show(path: str | os.PathLike[str]) -> str:
    """``path`` for a message, undecodable bytes replaced."""
    return os.fsencode(path).decode(errors="replace")


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _stat(path: Path) -> os.stat_result:
    try:
        return os.stat(path)
    except FileNotFoundError:
        hint = "; it is a link to a missing file" if path.is_symlink() else ""
        raise CheckpointError(f"no such file: {show(path)}{hint}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(f"{show(path)}: cannot be opened: {reason}") from None


def _is_directory(path: Path) -> bool:
    return stat.S_ISDIR(_stat(path).st_mode)


def _check_regular(path: Path) -> int:
    """Size of the file in bytes; looked at before opening, since opening a FIFO would block."""
    status = _stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise CheckpointError(f"{show(path)}: is a directory, expected a file")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{show(path)}: is not a regular file (a device, pipe or socket)")
    if status.st_size == 0:
        raise CheckpointError(f"{show(path)}: file is empty (0 bytes); download or copy it again")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{show(path)}: no permission to read it")
    return status.st_size


def _open_folder(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The weights and the ``config.json`` of a timm folder."""
    weights = next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    config_path = folder / "config.json"
    if not config_path.is_file():
        hint = f"; it holds {weights.name}: give that file, and --model NAME" if weights else ""
        raise CheckpointError(f"{show(folder)}: is a directory without a timm config.json{hint}")
    if weights is None:
        if (folder / "model.safetensors.index.json").exists():
            raise CheckpointError(f"{show(folder)}: sharded weights are not supported; save them as one file")
        raise CheckpointError(
            f"{show(folder)}: holds no weights, expected model.safetensors beside config.json"
        )
    size = _check_regular(config_path)
    if size > _MAX_CONFIG_BYTES:
        raise CheckpointError(f"{show(config_path)}: {size} bytes, expected at most {_MAX_CONFIG_BYTES}")
    try:
        text = config_path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{show(config_path)}: cannot be read: {error}") from None
    config = parse_json(text, show(config_path))
    if not isinstance(config, dict):
        raise CheckpointError(f"{show(config_path)}: expected an object, found {type(config).__name__}")
    return weights, config


def _sniff(path: Path, size: int) -> Format:
    """The format by content; a :class:`CheckpointError` that says what else the file looks like."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{show(path)}: cannot be opened: {error.strerror}") from None
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "torch"
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{show(path)}: this is a git-lfs pointer, not the checkpoint itself; run git lfs pull"
        )
    header_bytes = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and header_bytes <= _MAX_HEADER_BYTES:
        return "safetensors"
    if re.match(rb"\x80[\x02-\x05]", start):
        return "torch"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<"):
        raise CheckpointError(
            f"{show(path)}: this is an HTML page, not a checkpoint; download the file itself"
        )
    if start[257:262] == b"ustar":
        raise CheckpointError(
            f"{show(path)}: this is a tar archive (a very old torch format); load it with the torch that "
            "made it and save the state dict again"
        )
    if size < 9:
        raise CheckpointError(f"{show(path)}: {size} bytes are too few for a checkpoint")
    if text.startswith(b"{"):
        raise CheckpointError(
            f"{show(path)}: this is JSON text, not a checkpoint; give the file with the weights"
        )
    if start[8:9] == b"{":
        raise CheckpointError(
            f"{show(path)}: not a safetensors file: its header would be {header_bytes} bytes, "
            f"at most {_MAX_HEADER_BYTES} are allowed"
        )
    raise CheckpointError(
        f"{show(path)}: not a checkpoint: neither safetensors nor a torch file by its first bytes "
        f"{start[:8]!r}"
    )


def _safetensors_header(path: Path, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a safetensors file, every claim of its header checked against its size."""
    where = show(path)
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise CheckpointError(
                f"{where}: truncated: the header says {length} bytes, the file has {size - 8} after "
                "its first 8; download or copy it again"
            )
        raw = file.read(length)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: the safetensors header is not UTF-8 ({error.reason})") from None
    document = parse_json(text, f"{where}: safetensors header")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__ of a safetensors file maps text to text")
    if len(document) > _MAX_TENSORS:
        raise CheckpointError(f"{where}: {len(document)} tensors, expected at most {_MAX_TENSORS}")
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in document.items():
        tensors[name], begin, end = _tensor_entry(where, name, entry)
        spans.append((begin, end, name))
    expected = 0
    for begin, end, name in sorted(spans):
        if begin != expected:
            problem = "overlaps the one before" if begin < expected else "leaves a hole before it"
            raise CheckpointError(
                f"{where}: tensor {name!r:.200} {problem} (starts at {begin}, expected {expected})"
            )
        expected = end
    found = size - 8 - length
    if found < expected:
        raise CheckpointError(
            f"{where}: truncated: {found} of {expected} bytes of weights; download or copy it again"
        )
    if found > expected:
        raise CheckpointError(f"{where}: {found - expected} unexpected bytes after the last tensor")
    if not tensors:
        raise CheckpointError(f"{where}: holds no tensors")
    return tensors, metadata


def _tensor_entry(where: str, name: str, entry: object) -> tuple[TensorInfo, int, int]:
    what = f"{where}: tensor {name!r:.200}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{what}: a header entry has exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not all(_is_size(n) for n in shape) or len(shape) > 16:
        raise CheckpointError(f"{what}: shape is a short list of sizes, found {shape!r:.100}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise CheckpointError(f"{what}: data_offsets is begin and end, found {offsets!r:.100}")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        if isinstance(dtype, str) and _REFUSED_DTYPE.fullmatch(dtype):
            raise CheckpointError(
                f"{what}: quantised or complex weights are not supported, "
                f"found {dtype}, expected a float dtype"
            )
        raise CheckpointError(f"{what}: unknown dtype {dtype!r:.50}")
    torch_dtype, item_bytes = _DTYPES[dtype]
    nbytes = item_bytes
    for n in shape:
        nbytes *= n
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{what}: shape {shape} of {dtype} is {nbytes} bytes, data_offsets span {offsets[1] - offsets[0]}"
        )
    return TensorInfo(tuple(shape), torch_dtype), offsets[0], offsets[1]


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _torch_header(path: Path, size: int, config: Mapping[str, Any] | None) -> FileHeader:
    """What a ``.pth`` holds, from its pickle alone: storages go to the meta device unread."""
    where = show(path)
    if zipfile.is_zipfile(path) or _starts_as_zip(path):
        _check_zip(path, size)
    checkpoint = _torch_load(path, "meta")
    part, state_dict = _pick_part(where, checkpoint)
    cleaned = _clean(where, state_dict)
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in cleaned.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{where}: {name!r:.200} is a {type(tensor).__name__}, expected a tensor; "
                "save the state dict alone: torch.save(model.state_dict(), ...)"
            )
        if tensor.layout != torch.strided or tensor.dtype not in _PLAIN_DTYPES:
            raise CheckpointError(
                f"{where}: tensor {name!r:.200}: quantised, sparse or complex weights are not supported, "
                f"found {str(tensor.dtype).removeprefix('torch.')}, expected a float dtype"
            )
        if tensor.numel() * tensor.element_size() > size:
            raise CheckpointError(
                f"{where}: tensor {name!r:.200} claims {tensor.numel() * tensor.element_size()} bytes, "
                f"the whole file has {size}"
            )
        tensors[name] = TensorInfo(tuple(tensor.shape), tensor.dtype)
    if not tensors:
        raise CheckpointError(f"{where}: holds no tensors")
    return FileHeader(
        path,
        "torch",
        tensors,
        config=config,
        part=part,
        prefix_stripped=list(cleaned) != list(state_dict),
        has_yacs_config=yacs.holds_config(checkpoint),
    )


def _starts_as_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _check_zip(path: Path, size: int) -> None:
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
    if len(pickles) != 1:
        raise CheckpointError(f"{where}: a zip file, but not a torch checkpoint (no data.pkl inside)")
    deflated = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    unpacked = sum(member.file_size for member in members)
    if deflated or unpacked > size:
        raise CheckpointError(
            f"{where}: compressed torch files are not supported (torch writes none): {unpacked} bytes "
            f"unpacked from {size}; save the state dict again with torch.save"
        )
    if pickles[0].file_size > _MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{where}: its pickle has {pickles[0].file_size} bytes, too many for a state dict"
        )


def _torch_load(path: Path, device: str) -> Any:
    """``torch.load`` as timm's loader calls it: weights only, ``argparse.Namespace`` allowed.

    The one thing more that is let in, and read by no less strict a reader, is a yacs configuration.
    """
    import argparse
    import pickle

    where = show(path)
    try:
        # An open file, since torch too would go by the suffix of a path.
        with (
            torch.serialization.safe_globals([argparse.Namespace]),
            open(path, "rb") as file,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # about pickles it then refuses; the refusal says it all
            return torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        if not yacs.is_only_obstacle(path):
            raise CheckpointError(f"{where}: {_blocked(path, str(error))}") from None
    except Exception as error:  # a hostile pickle may fail in any way; none of them is a fault of mhacut
        raise _broken(where, error) from None
    try:
        return yacs.load(path, device)
    except Exception as error:  # a hostile pickle may fail in any way; none of them is a fault of mhacut
        raise _broken(where, error) from None


def _broken(where: str, error: Exception) -> CheckpointError:
    # torch 2.15 looks into sparse tensors, which are not there to be seen.
    if isinstance(error, NotImplementedError) and "meta tensor" in str(error):
        return CheckpointError(
            f"{where}: quantised, sparse or complex weights are not supported; save them dense (to_dense())"
        )
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return CheckpointError(
        f"{where}: truncated, or not a torch checkpoint ({reason:.200}); download or copy it again"
    )


def _blocked(path: Path, reason: str) -> str:
    """Why the safe unpickler stopped, and what to do about it."""
    try:
        with open(path, "rb") as file:
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # legacy files and bare pickles cannot be listed
        names = re.findall(r"GLOBAL ([\w.]+)", reason)[:1] or _globals_of_pickle(path)
    if not names:
        return "a pickle, but no torch checkpoint that loads safely; save the state dict with torch.save"
    listed = ", ".join(repr(name)[1:-1] for name in names[:5]) + (", ..." if len(names) > 5 else "")
    convert = (
        "If you trust where it comes from, convert it where it can do no harm: "
        'c = torch.load(FILE, weights_only=False); torch.save(c.state_dict(), "weights.pth") '
        '(or c["state_dict"], c["model"])'
    )
    if any(name.startswith("numpy") for name in names) and all(
        name.startswith(("numpy", "_codecs")) for name in names
    ):
        return (
            f"contains numpy values beside the weights ({listed}), which loading could run code through; "
            f"save them as float(x), or the state dict alone. {convert}"
        )
    return (
        f"contains a pickled model or other objects, not a state dict ({listed}); nothing was run. {convert}"
    )


def _globals_of_pickle(path: Path) -> list[str]:
    """What a bare pickle would import, read from its opcodes without running them."""
    import pickletools

    names: list[str] = []
    texts: list[str] = []
    with open(path, "rb") as file, suppress(Exception):  # broken pickles fail in every way
        for opcode, argument, _ in pickletools.genops(file.read(_MAX_CONFIG_BYTES)):
            if opcode.name == "GLOBAL":
                names.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                names.append(".".join(texts[-2:]))
            elif isinstance(argument, str):
                texts.append(argument)
    return names


def _pick_part(where: str, checkpoint: object) -> tuple[str | None, Mapping[Any, Any]]:
    """The state dict inside a checkpoint, and the name of the part it is; chosen in timm's order.

    Training scripts with a yacs configuration evaluate, and publish the accuracy of, their ``model``.
    """
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{where}: expected a dict of tensors, found {type(checkpoint).__name__}")
    part = None
    for name in ("model", *_EMA_FIRST) if yacs.holds_config(checkpoint) else _EMA_FIRST:
        if name in checkpoint and (checkpoint[name] is not None or not name.endswith("_ema")):
            part = name
            break
    state_dict = checkpoint if part is None else checkpoint[part]
    if not isinstance(state_dict, Mapping):
        found = "None" if state_dict is None else type(state_dict).__name__
        raise CheckpointError(
            f"{where}: {part!r} of the checkpoint: expected a dict of tensors, found {found}"
        )
    return part, state_dict


def _clean(where: str, state_dict: Mapping[Any, Any]) -> dict[str, Any]:
    from timm.models import clean_state_dict

    for name in state_dict:
        if not isinstance(name, str):
            raise CheckpointError(f"{where}: expected tensor names, found key {name!r:.100}")
    cleaned: dict[str, Any] = clean_state_dict(dict(state_dict))
    if len(cleaned) != len(state_dict):
        raise CheckpointError(
            f"{where}: two tensors have the same name once module. or _orig_mod. is taken off"
        )
    return cleaned


def _torch_tensors(header: FileHeader) -> dict[str, Tensor]:
    """The state dict through timm's own safe loader, or ours where that one refuses a yacs configuration."""
    from timm.models import load_state_dict

    path = header.path
    if header.has_yacs_config:
        return _clean(show(path), _pick_part(show(path), _torch_load(path, "cpu"))[1])
    try:
        if path.suffix != ".safetensors":
            return dict(load_state_dict(str(path), weights_only=True))
        # timm goes by the suffix: show it the same file under a name that fits the content.
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder, "weights.pth")
            os.symlink(path.resolve(), link)
            return dict(load_state_dict(str(link), weights_only=True))
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{show(path)}: its content is a torch file that cannot be read "
            f"({str(error).splitlines()[0]:.200}); if its name ends in .safetensors, rename it to .pth"
        ) from None
