"""Find the dimension of the channels in what a module gives: [B, tokens, C], [B, C, H, W] or [B, H, W, C]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Layer

Run = Callable[[Tensor], Sequence[Tensor]]
"""Run a model on images [B, C, H, W] and return some tensors that it computes."""


@torch.no_grad()
def channel_dims(model: nn.Module, run: Run, layers: Sequence[Layer], image: Tensor) -> list[int]:
    """Return the dimension of the channels in each tensor that ``run(image)`` gives.

    It may not be that of the layers inside: many stages run on tokens and give [B, C, H, W].

    Args:
        model: eval mode.
        run: run ``model``.
        layers: for each tensor, the last layer that it passes through.
        image: [1, C, H, W].
    """
    dims = []
    for number, (found, layer) in enumerate(zip(run(image), layers, strict=True)):
        dim = -1 if found.ndim != 4 else _dim_of_one_token(model, run, number, layer, image)
        dim = _dim_beside_pixels(found.shape, image.shape) if dim is None else dim
        # If all else fails: convolutions, which mix tokens, give [B, C, H, W].
        dims.append(1 if dim is None else dim)
    return dims


def _dim_of_one_token(model: nn.Module, run: Run, number: int, layer: Layer, image: Tensor) -> int | None:
    """The dimension along which the first token of ``layer`` lies in a map, found by making it NaN.

    None if it reaches all tokens of a row or column, or none.
    """

    def spoil(module: nn.Module, args: object, output: object) -> object:
        if not isinstance(output, Tensor):
            return None
        output = output.clone()
        tokens = output.movedim(layer.channel_dim, -1)
        tokens[(0,) * (tokens.ndim - 1)] = torch.nan
        return output

    name = f"{layer.name}.{layer.result}".rstrip(".")
    with model.get_submodule(name).register_forward_hook(spoil):
        spoilt = run(image)[number].isnan()
    lines = {dim: spoilt.movedim(dim, 0).flatten(1).any(1) for dim in (1, 2, 3)}
    whole = [dim for dim, line in lines.items() if len(line) > 1 and line.all()]
    if whole == [1]:
        return 1
    return -1 if whole == [3] else None


def _dim_beside_pixels(shape: torch.Size, image: torch.Size) -> int | None:
    """The dimension beside the two that are in the ratio of the image's height and width, if only two are."""
    height, width = image[-2:]
    # Each size is rounded, by less than 1; a square image has square maps.
    first, last = (abs(rows * width - columns * height) for rows, columns in (shape[1:3], shape[2:4]))
    if first == last or min(first, last) >= max(height, width):
        return None
    return -1 if first < last else 1
