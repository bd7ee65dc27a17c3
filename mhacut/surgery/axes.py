"""Read and write the channels of a unit in the tensors of its layer."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from mhacut.adapters.base import NORM_TENSORS, ChannelAxis, Unit


def axes_of(unit: Unit) -> tuple[ChannelAxis, ...]:
    """Axes of ``unit``, including those in the batch norms after them."""
    axes: list[ChannelAxis] = []
    for axis in unit.axes:
        axes.append(axis)
        if axis.norm is not None:
            axes += [norm_axis(axis, name) for name in NORM_TENSORS]
    return tuple(axes)


def channels_of(module: nn.Module, unit: Unit, axis: ChannelAxis) -> Tensor:
    """Return a copy of the unit's channels in one tensor, [H, d, copies, ...]."""
    tensor = tensor_of(module, axis.tensor).detach().movedim(axis.dim, 0)
    return tensor[axis.rows(unit.heads, unit.width).to(tensor.device)]


def set_channels(module: nn.Module, unit: Unit, axis: ChannelAxis, channels: Tensor) -> None:
    """Write ``channels``, of the shape that :func:`channels_of` returns, into one tensor in place."""
    tensor = tensor_of(module, axis.tensor).detach().movedim(axis.dim, 0)
    tensor[axis.rows(unit.heads, unit.width).to(tensor.device)] = channels.to(tensor.dtype)


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer of ``module`` by its dotted name."""
    owner, _, last = name.rpartition(".")
    tensor = getattr(module.get_submodule(owner), last)
    assert isinstance(tensor, Tensor), name
    return tensor


def has_tensor(module: nn.Module, name: str) -> bool:
    """Whether ``module`` has a parameter or buffer of this name that is not None."""
    owner, _, last = name.rpartition(".")
    return isinstance(getattr(module.get_submodule(owner), last, None), Tensor)


def norm_axis(axis: ChannelAxis, tensor: str) -> ChannelAxis:
    """Axis of the same channels in one tensor of the batch norm behind ``axis``."""
    return replace(axis, tensor=f"{axis.norm}.{tensor}", dim=0, norm=None)


def select_heads(axis: ChannelAxis, values: Tensor) -> Tensor:
    """Return the part of ``values`` [H, ...] of the heads whose channels lie along ``axis``."""
    if axis.shared:  # all alike
        return values[:1]
    return values if axis.heads is None else values[slice(*axis.heads)]
