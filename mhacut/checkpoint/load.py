"""Open a checkpoint, dense or slim."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from torch import nn

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.huggingface import is_pruned_folder, open_huggingface
from mhacut.checkpoint.identity import ModelHints
from mhacut.checkpoint.module import with_args
from mhacut.checkpoint.remote import HUB_PREFIXES, TIMM_PREFIX, open_from_hub, open_pretrained
from mhacut.errors import CheckpointError, MhacutError
from mhacut.options.base import CheckpointOptions
from mhacut.runtime.device import default_torch
from mhacut.runtime.files import REMOTE, check_checkpoint
from mhacut.runtime.progress import Reporter


def open_checkpoint(source: str | os.PathLike[str], **hints: Any) -> Checkpoint:
    """Open a checkpoint. The weights of a file are read on first use."""
    given = ModelHints(**hints)
    if isinstance(source, str) and source.startswith(TIMM_PREFIX):
        return open_pretrained(source, given)
    if isinstance(source, str) and source.startswith(HUB_PREFIXES):
        return open_from_hub(source, given)
    check_checkpoint(source)  # an empty name, too, which pathlib takes for the working directory
    if is_pruned_folder(source):
        return open_huggingface(source, given)
    checkpoint = Checkpoint.open(source, given)
    if checkpoint.header is not None and "model_type" in (checkpoint.header.config or {}):
        try:
            _ = checkpoint.identity
        except CheckpointError:  # timm has no such model
            with suppress(MhacutError):
                return open_huggingface(source, given)
            raise
    return checkpoint


def read_model(source: str | os.PathLike[str], **hints: Any) -> Checkpoint:
    checkpoint = open_checkpoint(source, **hints)
    _ = checkpoint.model
    return checkpoint


def states_its_model(source: str | os.PathLike[str], part: str | None = None) -> bool:
    if (isinstance(source, str) and source.startswith(REMOTE)) or is_pruned_folder(source):
        return True
    opened = Checkpoint.open(source, ModelHints(part=part))
    return opened.record is not None or (opened.header is not None and opened.header.config is not None)


def open_from_options(options: CheckpointOptions, reporter: Reporter, *, weights: bool = True) -> Checkpoint:
    hints = {name: getattr(options, name) for name in ("model", "model_args", "num_classes", "part")}
    checkpoint = open_checkpoint(options.checkpoint, **hints)
    if weights:
        _ = checkpoint.model
    for note in checkpoint.notes:
        reporter.log(note)
    return checkpoint


@default_torch()
def load_model(
    path: str | os.PathLike[str] | None,
    model: str | None = None,
    *,
    part: str | None = None,
    **model_args: Any,
) -> nn.Module:
    """Return the model in a dense or slim checkpoint: a timm module in eval mode, float32, on the CPU.

    timm's ``forward_features``, ``get_classifier``, ``reset_classifier`` and
    ``timm.data.resolve_data_config(model=...)`` work on it.

    Args:
        path: safetensors file, ``.pth`` file, folder, ``timm:NAME`` or ``hf-hub:OWNER/NAME``. For a pruned
            transformers folder, the result is a module from images to logits. Use :func:`load_pruned` for
            the transformers class.
        model: timm's name of the architecture. Default: inferred from the file.
        part: entry or module of a training checkpoint that holds the model. Default: inferred.
        model_args: further arguments of ``timm.create_model``, for example ``img_size=32``.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe or of an unknown model.
    """
    if path is None:
        raise CheckpointError("expected a file. A dry run of prune writes no file: use result.save(FILE)")
    num_classes = model_args.pop("num_classes", None)
    checkpoint = read_model(path, model=model, model_args=model_args, num_classes=num_classes, part=part)
    return with_args(checkpoint.model, checkpoint.identity)
