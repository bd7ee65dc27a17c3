"""Image size of official checkpoints, and resizing of their encodings, for all families."""

from __future__ import annotations

import math
from collections.abc import Mapping

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from mhacut.flatten.attention import FocusedLinearAttention


def unwrap(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the weights of a training checkpoint, ``{"model": ...}``, or else ``state_dict`` itself."""
    inner = state_dict.get("model", state_dict)
    return inner if isinstance(inner, Mapping) else state_dict


def resize_encodings(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return ``state_dict`` with its position tensors resized to the maps and windows of ``model``.

    ``positional_encoding`` and ``pos_embed``, [1, N, C], and ``relative_position_bias_table``, [N, h], are
    resized as the authors do: bicubic, the N positions taken as a square grid. A tensor whose N is no square
    number, or that differs in another dimension, stays as it is, and ``load_state_dict`` refuses it.
    """
    wanted = model.state_dict()
    grids = {**_encoding_grids(model), **_bias_grids(model), **getattr(model, "pos_embed_grids", {})}
    resized = dict(state_dict)
    for name, grid in grids.items():
        found = state_dict.get(name)
        if found is None or name not in wanted or found.shape == wanted[name].shape:
            continue
        tokens_first, shape = found.squeeze(0), wanted[name].shape
        side = math.isqrt(len(tokens_first)) if tokens_first.ndim == 2 else 0
        if side and side * side == len(tokens_first) and tokens_first.shape[-1] == shape[-1]:
            encoding = resample_abs_pos_embed(
                tokens_first.unsqueeze(0), grid, (side, side), num_prefix_tokens=0
            )
            resized[name] = encoding.reshape(shape)
    return resized


def encoded_img_size(shapes: Mapping[str, tuple[int, ...]], patch_size: int = 4) -> int | None:
    """Image size for which the positional encodings of a pyramid's checkpoint were trained.

    Args:
        shapes: shape of each tensor, by official names or timm's.
        patch_size: side in pixels of a token of stage 1, whose attention always is linear.

    Returns:
        Side in pixels of a square image; None without such encodings, or where no square image fits them.
    """
    tokens = [
        shape[1]
        for name, shape in shapes.items()
        if name.endswith(".positional_encoding") and len(shape) == 3
    ]
    side = math.isqrt(max(tokens, default=0))
    return side * patch_size if side and side * side == max(tokens) else None


def _encoding_grids(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        f"{name}.positional_encoding": (module.grid_size[0], module.grid_size[1])
        for name, module in model.named_modules()
        if isinstance(module, FocusedLinearAttention)
    }


def _bias_grids(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Height and width of each table of position biases: a row per offset of two tokens in a window."""
    windows = {
        name: module.window_size
        for name, module in model.named_modules()
        if "relative_position_bias_table" in module._parameters
    }
    return {
        f"{name}.relative_position_bias_table": (2 * height - 1, 2 * width - 1)
        for name, (height, width) in windows.items()
    }
