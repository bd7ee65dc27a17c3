"""The output projection of a unit: its weights, and the bias or norm behind them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mhacut.adapters.base import Unit


def effective_output_weights(module: nn.Module, unit: Unit) -> Tensor:
    """Output projection of the unit, times the scale or batch norm after it, [out, heads * width], float64.

    It maps errors of the unit's channels to errors of the layer's output. Where a channel is read at several
    places (by a convolution, or for several queries) it is [places * out, heads * width], place by place:
    squared errors sum to that of one place of the output if errors at the places are independent.

    Args:
        module: the layer.
        unit: one of its units, with an output projection.
    """
    assert unit.output_projection is not None
    columns = output_weights(module, unit).detach().double()
    projection = module.get_submodule(unit.output_projection.tensor.rpartition(".")[0])
    if isinstance(projection, nn.ConvTranspose2d):
        assert unit.output_scale is None
        assert unit.output_norm is None
        columns = columns / math.prod(projection.stride) ** 0.5  # an error spreads over so many more places
    if unit.output_scale is not None:
        columns = module.get_parameter(unit.output_scale).detach().double()[:, None] * columns
    if unit.output_norm is None:
        return columns
    return norm_factor(module.get_submodule(unit.output_norm))[:, None] * columns


def output_weights(module: nn.Module, unit: Unit) -> Tensor:
    """Output projection of the unit, [(places *) out, heads * width], as it is stored."""
    assert unit.output_projection is not None
    weight = module.get_parameter(unit.output_projection.tensor).movedim(unit.output_projection.dim, -1)
    columns = unit.output_projection.rows(unit.heads, unit.width).to(weight.device)  # (H, d, copies)
    # (..., out, H, d, copies) -> (copies, ..., out, H * d)
    read = weight.movedim(0, -2)[..., columns].movedim(-1, 0).flatten(-2)
    return read.reshape(-1, read.shape[-1])


@torch.no_grad()
def add_constant(module: nn.Module, unit: Unit, constant: Tensor) -> None:
    """Add ``constant``, [out] or [places * out], to the output of the unit's projection, in place.

    It goes into the bias after the projection, or the mean of the batch norm; without either, it is lost.
    """
    if unit.output_bias is not None:
        bias = module.get_parameter(unit.output_bias)
        bias.add_(constant.view(-1, len(bias)).sum(0).to(bias))
    elif unit.output_norm is not None:
        mean = module.get_submodule(unit.output_norm).running_mean
        assert isinstance(mean, Tensor)
        mean.sub_(constant.to(mean))


def norm_factor(norm: nn.Module) -> Tensor:
    """Factor of a batch norm in eval mode, [C], float64."""
    assert isinstance(norm, _BatchNorm)
    assert norm.running_var is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    return factor if norm.weight is None else factor * norm.weight.detach().double()
