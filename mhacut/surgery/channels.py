"""Read, write and mix channels in the tensors of a layer and in its output projection."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mhacut.adapters.base import NORM_TENSORS, ChannelAxis, Unit


def axes_of(unit: Unit) -> tuple[ChannelAxis, ...]:
    axes: list[ChannelAxis] = []
    for axis in unit.axes:
        axes.append(axis)
        if axis.norm is not None:
            axes += [norm_axis(axis, name) for name in NORM_TENSORS]
    return tuple(axes)


def channels_of(module: nn.Module, unit: Unit, axis: ChannelAxis) -> Tensor:
    """Return a copy of the channels in the tensor of ``axis``, [heads, width, copies, ...]."""
    tensor = tensor_of(module, axis.tensor).detach().movedim(axis.dim, 0)
    return tensor[axis.rows(unit.heads, unit.width).to(tensor.device)]


def set_channels(module: nn.Module, unit: Unit, axis: ChannelAxis, channels: Tensor) -> None:
    """Write ``channels`` [heads, width, copies, ...] into the tensor of ``axis``, in place."""
    tensor = tensor_of(module, axis.tensor).detach().movedim(axis.dim, 0)
    tensor[axis.rows(unit.heads, unit.width).to(tensor.device)] = channels.to(tensor.dtype)


def tensor_of(module: nn.Module, name: str) -> Tensor:
    owner, _, last = name.rpartition(".")
    tensor = getattr(module.get_submodule(owner), last)
    assert isinstance(tensor, Tensor), name
    return tensor


def has_tensor(module: nn.Module, name: str) -> bool:
    owner, _, last = name.rpartition(".")
    return isinstance(getattr(module.get_submodule(owner), last, None), Tensor)


def norm_axis(axis: ChannelAxis, tensor: str) -> ChannelAxis:
    """Return the axis for the channels of ``axis`` in ``tensor`` of the batch norm after the projection."""
    return replace(axis, tensor=f"{axis.norm}.{tensor}", dim=0, norm=None)


def select_heads(axis: ChannelAxis, values: Tensor) -> Tensor:
    if axis.shared:  # one row serves all heads
        return values[:1]
    return values if axis.heads is None else values[slice(*axis.heads)]


def effective_output_weights(module: nn.Module, unit: Unit) -> Tensor:
    """Return the output projection times its batch norm or LayerScale, [outputs, heads * width]."""
    # The matrix maps errors of the channels to errors of the output. A convolution, or several queries, read
    # a channel at several places: squared errors add up if the errors at the places are independent.
    assert unit.output_projection is not None
    columns = output_weights(module, unit).detach().double()
    projection = module.get_submodule(unit.output_projection.tensor.rpartition(".")[0])
    if isinstance(projection, nn.ConvTranspose2d):
        assert unit.output_scale is None
        assert unit.output_norm is None
        columns = columns / math.prod(projection.stride) ** 0.5  # an error spreads over prod(stride) outputs
    if unit.output_scale is not None:
        columns = module.get_parameter(unit.output_scale).detach().double()[:, None] * columns
    if unit.output_norm is None:
        return columns
    return norm_factor(module.get_submodule(unit.output_norm))[:, None] * columns


def output_weights(module: nn.Module, unit: Unit) -> Tensor:
    """Return the weights that read the channels, [outputs, heads * width].

    If several places read a channel, such as kernel positions, there are outputs for each place.
    """
    assert unit.output_projection is not None
    weight = module.get_parameter(unit.output_projection.tensor).movedim(unit.output_projection.dim, -1)
    columns = unit.output_projection.rows(unit.heads, unit.width).to(weight.device)  # (H, d, copies)
    # (..., out, H, d, copies) -> (copies, ..., out, H * d)
    read = weight.movedim(0, -2)[..., columns].movedim(-1, 0).flatten(-2)
    return read.reshape(-1, read.shape[-1])


@torch.no_grad()
def add_constant(module: nn.Module, unit: Unit, constant: Tensor) -> None:
    """Add a constant [outputs] to the output of the layer's output projection, in place."""
    if unit.output_bias is not None:
        bias = module.get_parameter(unit.output_bias)
        bias.add_(constant.view(-1, len(bias)).sum(0).to(bias))
    elif unit.output_norm is not None:
        mean = module.get_submodule(unit.output_norm).running_mean
        assert isinstance(mean, Tensor)
        mean.sub_(constant.to(mean))


def norm_factor(norm: nn.Module) -> Tensor:
    """Return the factor by which a batch norm multiplies each channel in eval mode, [C], float64."""
    assert isinstance(norm, _BatchNorm)
    assert norm.running_var is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    return factor if norm.weight is None else factor * norm.weight.detach().double()


@torch.no_grad()
def rotate(module: nn.Module, unit: Unit, basis: Tensor) -> None:
    """Change the basis of the channels by ``basis`` [H, d, d], in place.

    The outputs of the layer stay equal.
    """
    assert unit.mixing == "rotate"
    # (A q) . (A^-T k) = q . k. Likewise for the rows of v and the columns of the output projection.
    inverse = torch.linalg.inv(basis).mT
    for axis in unit.axes:
        mix(module, unit, axis, basis if axis in unit.scale_axes else inverse)


@torch.no_grad()
def mix(module: nn.Module, unit: Unit, axis: ChannelAxis, mixing: Tensor) -> None:
    """Multiply the channels in the tensor of ``axis`` by ``mixing`` [H, d, d], in place."""
    # A batch norm scales single channels, so its factor moves into the rows before they mix. Its variances
    # become those of the mixed rows (taken as independent) and its weight cancels them. The factor is then 1
    # in eval mode, and the statistics stay about right in training.
    linear, mixing = [axis], select_heads(axis, mixing)
    if axis.norm is not None:
        norm: Any = module.get_submodule(axis.norm)
        factor = norm_factor(norm)
        factor = factor[axis.rows(unit.heads, unit.width).to(factor.device)]  # (H, d, copies)
        for part in (axis, norm_axis(axis, "running_mean")):
            rows = channels_of(module, unit, part).double()
            set_channels(module, unit, part, rows * factor.view(*factor.shape, *[1] * (rows.dim() - 3)))
        bias = replace(axis, tensor=axis.tensor.removesuffix("weight") + "bias", dim=0, norm=None)
        if has_tensor(module, bias.tensor):  # moves into the norm's mean
            bias_values, mean = (
                channels_of(module, unit, part).double() for part in (bias, norm_axis(axis, "running_mean"))
            )
            set_channels(module, unit, norm_axis(axis, "running_mean"), mean - bias_values * factor)
            set_channels(module, unit, bias, torch.zeros_like(bias_values))
        variance = channels_of(module, unit, norm_axis(axis, "running_var")).double() * factor.square()
        mixed = torch.einsum("hij,hj...->hi...", mixing.square(), variance)
        set_channels(module, unit, norm_axis(axis, "running_var"), mixed)
        mixed = channels_of(module, unit, norm_axis(axis, "running_var")).double()  # as it was rounded
        set_channels(module, unit, norm_axis(axis, "weight"), (mixed + norm.eps).sqrt())
        linear += [norm_axis(axis, "running_mean"), norm_axis(axis, "bias")]
    for part in linear:
        rows = channels_of(module, unit, part).double()
        set_channels(module, unit, part, torch.einsum("hij,hj...->hi...", mixing, rows))
