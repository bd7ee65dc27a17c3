"""What the checkpoint filters of the families share: tensors of another resolution, made to fit."""

from __future__ import annotations

import math
from collections.abc import Mapping

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn


def unwrap(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights of an official training checkpoint, ``{"model": ..., "config": ...}``, or ``state_dict``."""
    inner = state_dict.get("model", state_dict)
    return inner if isinstance(inner, Mapping) else state_dict


def resize_encodings(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``state_dict`` with every ``positional_encoding`` and ``pos_embed`` resized to the grids of ``model``.

    Bicubic on the square grid that the number of tokens stands for. What is no square, or differs in more than
    the number of tokens, is left for ``load_state_dict`` to refuse.
    """
    wanted = model.state_dict()
    grids = {
        f"{name}.positional_encoding": tuple(module.grid_size)
        for name, module in model.named_modules()
        if "positional_encoding" in module._parameters
    }
    grids |= {name: tuple(grid) for name, grid in getattr(model, "pos_embed_grids", {}).items()}
    resized = dict(state_dict)
    for name, grid in grids.items():
        found = state_dict.get(name)
        if found is None or name not in wanted or found.ndim != 3:
            continue
        side = math.isqrt(found.shape[1])
        same_but_tokens = found.shape[::2] == wanted[name].shape[::2]
        if found.shape != wanted[name].shape and same_but_tokens and side * side == found.shape[1]:
            resized[name] = resample_abs_pos_embed(found, grid, (side, side), num_prefix_tokens=0)
    return resized
