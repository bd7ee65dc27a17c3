"""Resolve the preprocessing of a checkpoint's images, and check that its model takes their size."""

from __future__ import annotations

import torch
from torch import nn

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.data import Preprocessing
from mhacut.errors import UsageError, option_name
from mhacut.options.base import PreprocessingOptions
from mhacut.surgery.find import patch_embedding
from mhacut.surgery.flops import weightless


def resolve_preprocessing(checkpoint: Checkpoint, override: PreprocessingOptions) -> Preprocessing:
    """Return the preprocessing that the slim file or timm's pretrained_cfg states, ``override`` on top.

    Images of a slim file have the size it was cut for, which the option ``img_size`` may have set, not the
    size that its model has by default.

    Raises:
        UsageError: an override makes no sense, or is an image size the model does not take.
        DataError: what the file states makes no sense.
    """
    identity = checkpoint.identity
    built_for = checkpoint.input_size
    # timm's patch embeddings refuse other sizes, or interpolate positions for them, by this flag.
    strict = bool(getattr(patch_embedding(checkpoint.skeleton), "strict_img_size", False))
    stated = identity.pretrained_cfg
    if checkpoint.record is not None:
        stated = checkpoint.record.preprocessing
        channels, height, width = stated["input_size"]
        built_for = (channels, height, width)
    size = override.img_size
    if size is not None and strict and built_for[1:] != (size, size):
        raise UsageError(
            f"{option_name('img_size', size)}: the model takes images of {built_for[1]}x{built_for[2]} only; "
            f"leave it out, or build the dense model with {option_name('model_args', {'img_size': size})} "
            f"or {option_name('model_args', {'dynamic_img_size': True})}"
        )
    resolved = Preprocessing.resolve(stated, built_for, override)
    if size is not None and resolved.input_size != built_for:
        _require_it_runs(checkpoint.skeleton, resolved.input_size, built_for)
    return resolved


@torch.no_grad()
def _require_it_runs(model: nn.Module, size: tuple[int, int, int], built_for: tuple[int, int, int]) -> None:
    """Raise a :class:`UsageError` if ``model`` does not take images of ``size``; many say so only then."""
    # On the meta device the shapes of a forward pass cost nothing.
    stand_in = weightless(model)
    try:
        stand_in(torch.zeros((1, *size), dtype=next(stand_in.parameters()).dtype))
    except (AssertionError, RuntimeError, ValueError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"{option_name('img_size', size[1])}: the model takes images of {built_for[1]}x{built_for[2]} "
            f"only ({why:.200}); leave it out, or try to build the model for that size: "
            f"{option_name('model_args', {'img_size': size[1]})}"
        ) from error
