"""Writing a slim model back after its weights changed."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from torch import nn

from mhacut._version import __version__
from mhacut.checkpoint.files import sha256_of
from mhacut.checkpoint.load import read_header
from mhacut.checkpoint.write import write_slim
from mhacut.errors import CheckpointError


def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    like: str | os.PathLike[str],
    overwrite: bool = False,
) -> None:
    """Write ``model``, opened from the slim file ``like`` and trained since, as a slim file of its own.

        model = mhacut.load_model("vit-2.0G.safetensors")
        train(model)
        mhacut.save_model(model, "vit-2.0G-tuned.safetensors", like="vit-2.0G.safetensors")

    The new file states the same cut, and one step more in its history. A classifier replaced by
    ``reset_classifier`` is taken along.

    Args:
        model: as :func:`mhacut.load_model` gave it, with other weights.
        path: the file to write; never ``like`` itself.
        like: the slim file the model came from; tensors are written in the dtypes it has.
        overwrite: replace an existing file.

    Raises:
        CheckpointError: ``like`` is not a slim file, or not of this model.
        OutputError: the file must not or cannot be written.
    """
    header = read_header(like)
    if header.record is None:
        raise CheckpointError(
            f"{os.fspath(like)}: is no slim file; save a dense model with timm or safetensors"
        )
    record = header.record
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    classes = int(getattr(model, "num_classes", 0) or 0)
    head_changed = classes != record.identity.model_args.get("num_classes", classes)
    different = [name for name, shape in header.shapes.items() if shapes.get(name) != shape]
    if set(shapes) != set(header.shapes) or (different and not head_changed):
        named = sorted(set(shapes) ^ set(header.shapes)) + different
        raise CheckpointError(
            f"{os.fspath(like)}: is not the file this model was opened from; {len(named)} tensors differ, "
            f"first {named[0]}"
        )
    model_args: dict[str, Any] = {**record.identity.model_args, "num_classes": classes}
    cfg = {**record.identity.pretrained_cfg, "num_classes": classes}
    identity = dataclasses.replace(record.identity, model_args=model_args, pretrained_cfg=cfg)
    step = {
        "command": "save",
        "source_sha256": sha256_of(header.file.path),
        "versions": {"mhacut": __version__},
    }
    record = dataclasses.replace(record, identity=identity, history=(*record.history, step))
    write_slim(path, model, record, dtypes=header.dtypes, overwrite=overwrite, input_path=like)
