"""Open a checkpoint, dense or slim."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.identity import ModelHints
from mhacut.checkpoint.module import with_args
from mhacut.checkpoint.remote import HUB_PREFIXES, TIMM_PREFIX, open_from_hub, open_pretrained
from mhacut.errors import CheckpointError
from mhacut.options.base import CheckpointOptions
from mhacut.runtime.device import default_torch
from mhacut.runtime.files import REMOTE, check_checkpoint
from mhacut.runtime.progress import Reporter


def open_checkpoint(source: str | os.PathLike[str], **hints: Any) -> Checkpoint:
    """Open a checkpoint; of a file, only the header is read at first."""
    given = ModelHints(**hints)
    if isinstance(source, str) and source.startswith(TIMM_PREFIX):
        return open_pretrained(source, given)
    if isinstance(source, str) and source.startswith(HUB_PREFIXES):
        return open_from_hub(source, given)
    check_checkpoint(source)  # an empty name, too, which pathlib takes for the working directory
    return Checkpoint.open(source, given)


def read_model(source: str | os.PathLike[str], **hints: Any) -> Checkpoint:
    """Open a checkpoint and read its weights; arguments as for :func:`open_checkpoint`."""
    checkpoint = open_checkpoint(source, **hints)
    _ = checkpoint.model
    return checkpoint


def states_its_model(source: str | os.PathLike[str], part: str | None = None) -> bool:
    """Whether a checkpoint states its own architecture: ``timm:NAME``, a slim file or a folder."""
    if isinstance(source, str) and source.startswith(REMOTE):
        return True
    opened = Checkpoint.open(source, ModelHints(part=part))
    return opened.record is not None or (opened.header is not None and opened.header.config is not None)


def open_from_options(
    options: CheckpointOptions,
    reporter: Reporter,
    *,
    weights: bool = True,
) -> Checkpoint:
    """Open the checkpoint that a command is given, and log what was inferred about it."""
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
    ``timm.data.resolve_data_config(model=...)`` work on it. float16 and bfloat16 files are widened: call
    ``.half()`` on the result for the file's own precision.

    Args:
        path: whatever ``mhacut prune`` reads: safetensors, ``.pth``, a timm folder, ``timm:NAME``,
            ``hf-hub:OWNER/NAME``. None, which is the output of a dry run, is refused.
        model: timm's name of the architecture, for dense files that do not state it.
        part: entry of a training checkpoint, or module in it, that is the model; found out if None.
        model_args: further arguments of ``timm.create_model``, ``img_size=32``.

    Raises:
        CheckpointError: there is no file, or it cannot be read, recognised or trusted.
    """
    if path is None:
        raise CheckpointError(
            "there is no file to load; a dry run of prune writes none; its result has save(FILE)"
        )
    num_classes = model_args.pop("num_classes", None)
    checkpoint = read_model(path, model=model, model_args=model_args, num_classes=num_classes, part=part)
    return with_args(checkpoint.model, checkpoint.identity)
