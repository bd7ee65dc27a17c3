"""Read and write the channels of a unit in the tensors of its layer."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from mhacut.adapters.base import NORM_TENSORS, ChannelAxis, Unit


def axes_of(unit: Unit) -> tuple[ChannelAxis, ...]:
    """``unit.axes``, and what of batch norms behind them belongs to the channels."""
    axes: list[ChannelAxis] = []
    for axis in unit.axes:
        axes.append(axis)
        if axis.norm is not None:
            axes += [of_norm(axis, name) for name in NORM_TENSORS]
    return tuple(axes)


def channels_of(module: nn.Module, unit: Unit, axis: ChannelAxis) -> Tensor:
    """What of one tensor belongs to the unit's channels: a copy, [H, d, copies, ...]."""
    tensor = tensor_of(module, axis.tensor).detach().movedim(axis.dim, 0)
    return tensor[axis.rows(unit.heads, unit.width).to(tensor.device)]


def set_channels(module: nn.Module, unit: Unit, axis: ChannelAxis, channels: Tensor) -> None:
    """Write what :func:`channels_of` gives."""
    tensor = tensor_of(module, axis.tensor).detach().movedim(axis.dim, 0)
    tensor[axis.rows(unit.heads, unit.width).to(tensor.device)] = channels.to(tensor.dtype)


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of ``module``."""
    owner, _, last = name.rpartition(".")
    tensor = getattr(module.get_submodule(owner), last)
    assert isinstance(tensor, Tensor), name
    return tensor


def has_tensor(module: nn.Module, name: str) -> bool:
    owner, _, last = name.rpartition(".")
    return isinstance(getattr(module.get_submodule(owner), last, None), Tensor)


def of_norm(axis: ChannelAxis, tensor: str) -> ChannelAxis:
    """Where the channels of ``axis`` lie in one tensor of the batch norm behind it."""
    return replace(axis, tensor=f"{axis.norm}.{tensor}", dim=0, norm=None)


def of_heads(axis: ChannelAxis, of_all: Tensor) -> Tensor:
    """What of [H, ...] belongs to the heads whose channels lie along ``axis``."""
    if axis.shared:  # all alike
        return of_all[:1]
    return of_all if axis.heads is None else of_all[slice(*axis.heads)]
