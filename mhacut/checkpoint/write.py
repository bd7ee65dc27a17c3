"""Write slim files."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from mhacut._version import __version__
from mhacut.checkpoint.build import build_skeleton, shapes_of
from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.files import sha256_of
from mhacut.checkpoint.header import FLOAT_DTYPES
from mhacut.checkpoint.identity import LABEL_CFG_KEYS
from mhacut.checkpoint.module import unwrapped
from mhacut.checkpoint.record import METADATA_KEY, SlimRecord
from mhacut.errors import CheckpointError, OutputError
from mhacut.runtime.device import default_torch
from mhacut.runtime.files import AnyPath, check_output, write_file
from mhacut.surgery.costs import count_bytes
from mhacut.surgery.slice import cut
from mhacut.text import dtype_name


def write_slim(
    path: str | os.PathLike[str],
    model: nn.Module,
    record: SlimRecord,
    *,
    dtypes: Mapping[str, torch.dtype],
    overwrite: bool,
    input_path: str | os.PathLike[str] | None,
    check: Callable[[Path], None] | None = None,
) -> None:
    check_output(path, overwrite=overwrite, input_path=input_path)

    def write(temporary: Path) -> None:
        save_slim(temporary, model, record, dtypes)
        if check is not None:
            check(temporary)

    write_file(path, write, overwrite=overwrite, input_path=input_path)


def save_slim(path: Path, model: nn.Module, record: SlimRecord, dtypes: Mapping[str, torch.dtype]) -> None:
    """Write a slim file directly to ``path``. A crash can leave an incomplete file."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        # Counters and index tables keep their dtype.
        dtype = dtypes.get(name, tensor.dtype) if tensor.dtype in FLOAT_DTYPES else tensor.dtype
        # No copy where nothing changes: a copy of a large model may not fit into memory.
        tensors[name] = tensor.detach().to("cpu", dtype).contiguous()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensors[name]).all()):
            reason = "is not finite"
            if bool(torch.isfinite(tensor).all()):
                reason = f"has values too large for {dtype_name(dtype)}. Use float32 or bfloat16 weights"
            raise OutputError(f"nothing was written: tensor {name!r} {reason}")
    save_tensors(tensors, path, {"format": "pt", METADATA_KEY: record.to_json()})
    _sort_metadata(path)


def file_size(model: nn.Module, record: SlimRecord, dtypes: Mapping[str, torch.dtype]) -> int:
    tensors = count_bytes(model, dtypes)
    described = {
        name: {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [tensors, tensors],  # as many digits as any offset has
        }
        for name, tensor in model.state_dict().items()
    }
    header = {"__metadata__": {"format": "pt", METADATA_KEY: record.to_json()}, **described}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + len(text) + 8 + tensors  # length, header, padding


@default_torch()
def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    like: str | os.PathLike[str] | None,
    overwrite: bool = False,
) -> None:
    """Write ``model``, opened from the slim file ``like`` and trained, as a new slim file.

        model = mhacut.load_model("vit-2.0G.safetensors")
        train(model)
        mhacut.save_model(model, "vit-2.0G-tuned.safetensors", like="vit-2.0G.safetensors")

    Only weights are written. Changed activations, hooks and module settings are lost. A classifier changed by
    ``reset_classifier`` is kept. If the number of classes changed, the class names are dropped.

    Args:
        model: module from :func:`mhacut.load_model`.
        path: file to write; must differ from ``like``.
        like: slim file that ``model`` was loaded from. The new file has the same dtypes.
        overwrite: replace an existing file.

    Raises:
        CheckpointError: ``like`` is not the slim file of ``model``, or the pooling of ``model`` was changed.
        OutputError: the file cannot be written.
    """
    if like is None:
        raise CheckpointError(
            "like: expected a slim file, found None. A dry run of prune writes no file: use result.save(FILE)"
        )
    model = unwrapped(model)
    original = Checkpoint.open(like)
    record, header = original.record, original.header
    if record is None or header is None:
        raise CheckpointError(
            f"{os.fspath(like)}: expected a slim file. Save dense models with timm or safetensors"
        )
    classes = int(getattr(model, "num_classes", 0) or 0)
    identity = record.identity
    # After a change of the number of classes, the class names are unknown.
    dropped = LABEL_CFG_KEYS if classes != identity.model_args.get("num_classes", classes) else frozenset()
    cfg = {name: value for name, value in identity.pretrained_cfg.items() if name not in dropped}
    identity = dataclasses.replace(
        identity,
        model_args={**identity.model_args, "num_classes": classes},
        pretrained_cfg={**cfg, "num_classes": classes},
    )
    record = dataclasses.replace(record, identity=identity)
    skeleton = build_skeleton(record.identity, limit=header.tensors)
    cut(skeleton, record.plan)
    # The weights must fit the model that a reader of the new file will build.
    _check_same(model, skeleton, like)
    step = {
        "command": "save",
        "source_sha256": sha256_of(header.path),
        "versions": {"mhacut": __version__},
    }
    record = dataclasses.replace(record, history=(*record.history, step))
    write_slim(path, model, record, dtypes=header.dtypes, overwrite=overwrite, input_path=like)


def _check_same(model: nn.Module, skeleton: nn.Module, like: str | os.PathLike[str]) -> None:
    shapes, expected = shapes_of(model), shapes_of(skeleton)
    different = sorted(name for name in shapes | expected if shapes.get(name) != expected.get(name))
    if different:
        raise CheckpointError(
            f"{os.fspath(like)}: does not fit this model: {len(different)} tensors differ, first "
            f"{different[0]}. Give the slim file that the model came from"
        )
    pooled, stated = _pooling(model), _pooling(skeleton)
    for name in stated:
        if pooled.get(name, stated[name]) != stated[name]:
            raise CheckpointError(
                f"{os.fspath(like)}: has {name}={stated[name]!r}, the model has {pooled[name]!r}. Call "
                f"reset_classifier with global_pool={stated[name]!r}"
            )


def _pooling(model: nn.Module) -> dict[str, str]:
    return {
        f"{name}.{kind}".lstrip("."): pooling
        for name, module in model.named_modules()
        for kind in ("global_pool", "pool_type")
        if isinstance(pooling := vars(module).get(kind), str)
    }


def _sort_metadata(path: Path) -> None:
    """Sort a file's metadata: safetensors writes it in random order, and equal models need equal files."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # Padded with spaces to its old length, so that the tensors keep their place.
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def save_tensors(tensors: Mapping[str, Tensor], path: AnyPath, metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors. Call it inside :func:`mhacut.runtime.files.write_file`."""
    try:
        save_file(_unshared(tensors), path, dict(metadata))
    except SafetensorError as error:
        raise OSError(str(error)) from error  # for example, the disk is full


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory, which safetensors refuses."""
    # The first tensor of each storage is not copied: a copy of a large model may not fit into memory.
    unshared: dict[str, Tensor] = {}
    storages = set[int]()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        unshared[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return unshared
