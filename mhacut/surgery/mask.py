"""Masked model: a model with dense tensors in which a scale multiplies each channel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mhacut.adapters.base import ChannelAxis, Unit
from mhacut.plan import Basis, UnitKey, UnitPlan
from mhacut.surgery.channels import norm_axis, output_weights, select_heads
from mhacut.surgery.find import PrunableLayers


def temperature_factor(unit: Unit, width: float, basis: Basis) -> float:
    """Factor on attention logits that sets the softmax temperature which a cut to ``width`` channels has."""
    # Logits divided by sqrt(width) instead of sqrt(dense width) compensate for the removed channels. In the
    # PCA basis the kept channels hold most of the energy of the logits, so no factor is needed.
    if basis == "principal" or not unit.softmax_scaled:
        return 1.0
    return float((unit.width / width) ** 0.5)


def masked_tensors(
    model: nn.Module, prunable: PrunableLayers, channel_scales: Mapping[UnitKey, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of ``model`` multiplied by channel scales [heads, width], by tensor name."""
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
            for axis in scaled_axes(unit):
                name = f"{layer.name}.{axis.tensor}"
                # q, k and v share the rows of qkv: the scales of several units multiply one tensor.
                tensor = masked.get(name)
                if tensor is None:
                    tensor = model.get_parameter(name)
                masked[name] = _scaled(tensor, unit, axis, channel_scale)
    return masked


def run_with(model: nn.Module, tensors: Mapping[str, Tensor], images: Tensor) -> Tensor:
    # tie_weights=True leaves a substitute behind in a module of several names.
    outputs: Tensor = torch.func.functional_call(model, dict(tensors), (images,), tie_weights=False)
    return outputs


@torch.no_grad()
def scale(module: nn.Module, unit: Unit, channel_scale: Tensor) -> None:
    flat = channel_scale.reshape(-1)  # (H * d)
    for axis in scaled_axes(unit):
        parameter = module.get_parameter(axis.tensor)
        scaled = _scaled(parameter.detach().double(), unit, axis, flat.to(parameter.device))
        parameter.copy_(scaled.to(parameter.dtype))


def set_gate(module: nn.Module, unit: Unit, channel_scale: Tensor) -> None:
    assert unit.gate is not None
    owner, _, name = unit.gate.rpartition(".")
    setattr(module.get_submodule(owner), name, channel_scale.reshape(-1))


def scaled_axes(unit: Unit) -> tuple[ChannelAxis, ...]:
    """Return the tensor rows that channel scales multiply, or the batch norm after these rows."""
    # In training, a batch norm would undo a scale on the rows before it.
    axes: list[ChannelAxis] = []
    for axis in unit.scale_axes:
        axes += [axis] if axis.norm is None else [norm_axis(axis, "weight"), norm_axis(axis, "bias")]
    return tuple(axes)


def _scaled(tensor: Tensor, unit: Unit, axis: ChannelAxis, channel_scale: Tensor) -> Tensor:
    size = tensor.shape[axis.dim]
    rows = axis.rows(unit.heads, unit.width).to(channel_scale.device)
    channel_scale = select_heads(axis, channel_scale.view(unit.heads, unit.width)).reshape(-1)
    # Rows of other units in the same tensor keep a factor of 1.
    factor = channel_scale.new_ones(size).index_copy(
        0, rows.flatten(), channel_scale.repeat_interleave(rows.shape[-1])
    )
    shape = [1] * tensor.dim()
    shape[axis.dim] = size
    return tensor * factor.view(shape).to(tensor)


def kept_channels(unit_plan: UnitPlan) -> Tensor:
    kept = torch.zeros(unit_plan.heads, unit_plan.dense_width, dtype=torch.bool)
    for head, channels in enumerate(unit_plan.kept):
        kept[head, list(channels)] = True
    return kept


def constant_lost(module: nn.Module, unit: Unit, channel_scale: Tensor) -> Tensor:
    """Return the constant output [outputs] of channel biases that the channel scales remove."""
    columns = output_weights(module, unit)
    lost = columns.new_zeros(len(columns))
    for axis in unit.constants:
        first, last = axis.heads or (0, unit.heads)
        bias = module.get_parameter(axis.tensor)
        constant = bias.repeat(last - first) if axis.shared else bias
        part = slice(first * unit.width, last * unit.width)
        lost = lost + columns[:, part] @ (constant * (1 - channel_scale[part].to(constant)))
    return lost
