"""The masked model: dense shapes, with each channel's contribution times a scale."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mhacut.adapters.base import ChannelAxis, Unit
from mhacut.options.prune import Temperature
from mhacut.plan import Basis, UnitPlan
from mhacut.surgery.axes import of_heads, of_norm
from mhacut.surgery.find import PrunableLayers, UnitKey
from mhacut.surgery.output import output_weights


def temperature_factor(unit: Unit, width: float, temperature: Temperature, basis: Basis) -> float:
    """Factor on the logits of the masked dense model at ``width``: ``kept`` is 1/sqrt(kept width).

    That makes up for channels of the logits that went. Principal ones that stay have the logits' energy
    already: their temperature is the dense one.
    """
    if temperature == "dense" or basis == "principal" or not unit.softmax_scaled:
        return 1.0
    return float((unit.width / width) ** 0.5)


def masked_tensors(
    model: nn.Module, prunable: PrunableLayers, channel_scales: Mapping[UnitKey, Tensor]
) -> dict[str, Tensor]:
    """The tensors of the masked twin: those of ``model`` with each channel's contribution times its scale.

    A channel scale of 0 removes a channel exactly as :func:`cut` would. Differentiable in the channel
    scales; meant for :func:`run_with`. Tensors that no channel scale touches are left out.

    Args:
        model: the dense model.
        prunable: of that model.
        channel_scales: [heads, width] per unit.
    """
    masked: dict[str, Tensor] = {}
    for layer in prunable.layers:
        for unit in layer.units:
            if unit.key not in channel_scales:
                continue
            module = model.get_submodule(layer.name)
            channel_scale = channel_scales[unit.key].reshape(-1)  # (H * d)
            if unit.gate is not None:
                masked[f"{layer.name}.{unit.gate}"] = channel_scale
            if unit.constants:
                bias = f"{layer.name}.{unit.output_bias}"
                masked[bias] = model.get_parameter(bias) + constant_lost(module, unit, channel_scale)
            scaled = (part for axis in unit.scale_axes for part in scaled_with(axis))
            for axis in scaled:
                name = f"{layer.name}.{axis.tensor}"
                tensor = masked.get(name)
                if tensor is None:
                    tensor = model.get_parameter(name)
                masked[name] = _scaled(tensor, unit, axis, channel_scale)
    return masked


def run_with(model: nn.Module, tensors: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """What ``model`` gives with ``tensors`` in place of its own of these names; left as it was.

    One of the names of a module will do; tensors that several modules share need all of theirs.
    """
    # Where torch ties them by itself, it leaves one behind in a module of several names.
    outputs: Tensor = torch.func.functional_call(model, dict(tensors), (images,), tie_weights=False)
    return outputs


@torch.no_grad()
def scale(module: nn.Module, unit: Unit, channel_scale: Tensor) -> None:
    """Multiply the contribution of the unit's channels by ``channel_scale`` [heads, width], in place."""
    for axis in unit.scale_axes:
        for part in scaled_with(axis):
            _scale(module, unit, part, channel_scale)


def set_gate(module: nn.Module, unit: Unit, channel_scale: Tensor | None) -> None:
    """Put ``channel_scale`` [heads, width] into the unit's gate; None opens it."""
    assert unit.gate is not None
    owner, _, name = unit.gate.rpartition(".")
    setattr(module.get_submodule(owner), name, None if channel_scale is None else channel_scale.reshape(-1))


def scaled_with(axis: ChannelAxis) -> tuple[ChannelAxis, ...]:
    """What a channel scale multiplies: the rows, or the batch norm behind them.

    In training a batch norm would undo what is done to the rows.
    """
    if axis.norm is None:
        return (axis,)
    return of_norm(axis, "weight"), of_norm(axis, "bias")


def _scaled(tensor: Tensor, unit: Unit, axis: ChannelAxis, channel_scale: Tensor) -> Tensor:
    """``tensor`` with the unit's entries along ``axis`` times ``channel_scale`` [heads * width]."""
    size = tensor.shape[axis.dim]
    rows = axis.rows(unit.heads, unit.width).to(channel_scale.device)
    channel_scale = of_heads(axis, channel_scale.view(unit.heads, unit.width)).reshape(-1)
    factor = channel_scale.new_ones(size).index_copy(
        0, rows.flatten(), channel_scale.repeat_interleave(rows.shape[-1])
    )
    shape = [1] * tensor.dim()
    shape[axis.dim] = size
    return tensor * factor.view(shape).to(tensor)


def _scale(module: nn.Module, unit: Unit, axis: ChannelAxis, channel_scale: Tensor) -> None:
    parameter = module.get_parameter(axis.tensor)
    scaled = _scaled(parameter.detach().double(), unit, axis, channel_scale.reshape(-1).to(parameter.device))
    parameter.copy_(scaled.to(parameter.dtype))


def kept_channels(unit_plan: UnitPlan) -> Tensor:
    """Which channels stay, [heads, dense_width], bool."""
    kept = torch.zeros(unit_plan.heads, unit_plan.dense_width, dtype=torch.bool)
    for head, channels in enumerate(unit_plan.kept):
        kept[head, list(channels)] = True
    return kept


def constant_lost(module: nn.Module, unit: Unit, channel_scale: Tensor) -> Tensor:
    """Constant, [out], that the output bias must absorb when channels are scaled by [heads * width]."""
    columns = output_weights(module, unit)
    lost = columns.new_zeros(len(columns))
    for axis in unit.constants:
        first, last = axis.heads or (0, unit.heads)
        own = module.get_parameter(axis.tensor)
        constant = own.repeat(last - first) if axis.shared else own
        part = slice(first * unit.width, last * unit.width)
        lost = lost + columns[:, part] @ (constant * (1 - channel_scale[part].to(constant)))
    return lost
