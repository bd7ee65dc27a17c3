"""Change the basis of the channels of a unit in place."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mhacut.adapters.base import ChannelAxis, Unit
from mhacut.surgery.axes import channels_of, has_tensor, norm_axis, select_heads, set_channels
from mhacut.surgery.output import norm_factor


@torch.no_grad()
def rotate(module: nn.Module, unit: Unit, basis: Tensor) -> None:
    """Change the basis of the unit's channels in place; the layer computes the same as before.

    Args:
        module: the layer.
        unit: one of its units, whose mixing is ``rotate``.
        basis: A, [H, d, d], invertible: scale axes are multiplied by A, the other axes by A^-T. The same for
            all heads where their channels are tied.
    """
    assert unit.mixing == "rotate"
    inverse = torch.linalg.inv(basis).mT
    for axis in unit.axes:
        mix(module, unit, axis, basis if axis in unit.scale_axes else inverse)


@torch.no_grad()
def mix(module: nn.Module, unit: Unit, axis: ChannelAxis, mixing: Tensor) -> None:
    """Multiply the unit's channels in one tensor, and the batch norm behind it, by ``mixing`` [H, d, d].

    A batch norm scales single channels, so its factor moves into the rows first. Its variances become those
    of the mixed rows, as if the rows were independent, and its weight undoes them: in eval mode it scales by
    1, and in training its statistics stay about what they are.
    """
    linear, mixing = [axis], select_heads(axis, mixing)
    if axis.norm is not None:
        norm = module.get_submodule(axis.norm)
        factor = norm_factor(norm)
        factor = factor[axis.rows(unit.heads, unit.width).to(factor.device)]  # (H, d, copies)
        for part in (axis, norm_axis(axis, "running_mean")):
            rows = channels_of(module, unit, part).double()
            set_channels(module, unit, part, rows * factor.view(*factor.shape, *[1] * (rows.dim() - 3)))
        bias = replace(axis, tensor=axis.tensor.removesuffix("weight") + "bias", dim=0, norm=None)
        if has_tensor(module, bias.tensor):  # moves into the norm's mean
            own, mean = (
                channels_of(module, unit, part).double() for part in (bias, norm_axis(axis, "running_mean"))
            )
            set_channels(module, unit, norm_axis(axis, "running_mean"), mean - own * factor)
            set_channels(module, unit, bias, torch.zeros_like(own))
        variance = channels_of(module, unit, norm_axis(axis, "running_var")).double() * factor.square()
        mixed = torch.einsum("hij,hj...->hi...", mixing.square(), variance)
        set_channels(module, unit, norm_axis(axis, "running_var"), mixed)
        mixed = channels_of(module, unit, norm_axis(axis, "running_var")).double()  # as it was rounded
        set_channels(module, unit, norm_axis(axis, "weight"), (mixed + _eps(norm)).sqrt())
        linear += [norm_axis(axis, "running_mean"), norm_axis(axis, "bias")]
    for part in linear:
        rows = channels_of(module, unit, part).double()
        set_channels(module, unit, part, torch.einsum("hij,hj...->hi...", mixing, rows))


def _eps(norm: nn.Module) -> float:
    assert isinstance(norm, _BatchNorm)
    return norm.eps
