"""The output projection of a unit: its weights, and the bias or norm behind them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mhacut.adapters.base import Unit


def effective_output_weights(module: nn.Module, unit: Unit) -> Tensor:
    """The weights that read the unit's channels in the layer ``module``, [out, heads * width], float64.

    With the factors of a scale or a batch norm behind them, so that they tell errors of what the layer gives.
    Of a channel that is read at several places (by a convolution, or as several queries have it), [places *
    out, heads * width], those of a place together: squares sum to that of one place of the output, if errors
    at the places are independent.
    """
    assert unit.output_projection is not None
    columns = output_weights(module, unit).detach().double()
    reader = module.get_submodule(unit.output_projection.tensor.rpartition(".")[0])
    if isinstance(reader, nn.ConvTranspose2d):
        assert unit.output_scale is None
        assert unit.output_norm is None
        columns = columns / math.prod(reader.stride) ** 0.5  # of an error, spread over so many more places
    if unit.output_scale is not None:
        columns = module.get_parameter(unit.output_scale).detach().double()[:, None] * columns
    if unit.output_norm is None:
        return columns
    return norm_factor(module.get_submodule(unit.output_norm))[:, None] * columns


def output_weights(module: nn.Module, unit: Unit) -> Tensor:
    """As :func:`effective_output_weights`, but the parameter itself, of its own dtype."""
    assert unit.output_projection is not None
    weight = module.get_parameter(unit.output_projection.tensor).movedim(unit.output_projection.dim, -1)
    columns = unit.output_projection.rows(unit.heads, unit.width).to(weight.device)  # (H, d, copies)
    # (..., out, H, d, copies) -> (copies, ..., out, H * d)
    read = weight.movedim(0, -2)[..., columns].movedim(-1, 0).flatten(-2)
    return read.reshape(-1, read.shape[-1])


@torch.no_grad()
def add_constant(module: nn.Module, unit: Unit, constant: Tensor) -> None:
    """Add ``constant`` [out], or [places * out], to what the columns of the unit's readout give."""
    if unit.output_bias is not None:
        bias = module.get_parameter(unit.output_bias)
        bias.add_(constant.view(-1, len(bias)).sum(0).to(bias))
    elif unit.output_norm is not None:
        mean = module.get_submodule(unit.output_norm).running_mean
        assert isinstance(mean, Tensor)
        mean.sub_(constant.to(mean))


def norm_factor(norm: nn.Module) -> Tensor:
    """What a batch norm in eval mode multiplies by, [C], float64."""
    assert isinstance(norm, _BatchNorm)
    assert norm.running_var is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    return factor if norm.weight is None else factor * norm.weight.detach().double()
