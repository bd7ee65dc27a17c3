"""Cut channels of a model by a plan: the tensors become smaller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mhacut.adapters.base import Layer, Unit
from mhacut.plan import Plan, UnitKey, UnitKind, UnitPlan
from mhacut.surgery.channels import add_constant, axes_of, tensor_of
from mhacut.surgery.find import PrunableLayers, check_plan, find_prunable_layers
from mhacut.surgery.mask import constant_lost, kept_channels, scale
from mhacut.surgery.tokens import apply_tokens

_MIN_GATE = 1e-60
"""Minimum scale of a kept channel with a gate, since parameters can absorb positive scales only. The q/k
features are then multiplied by 1e-10, which is small against the 1e-6 that the layer adds."""


def exact_scale(unit: Unit, width: int) -> float:
    """Factor on q/k channels that keeps the dense softmax temperature after a cut to ``width``."""
    # The layer divides logits by sqrt(width): at k of d channels they grow by sqrt(d / k).
    return float((width / unit.width) ** 0.5) if unit.softmax_scaled else 1.0


@torch.no_grad()
def cut(
    model: nn.Module,
    plan: Plan,
    channel_scales: Mapping[UnitKey, Tensor] | None = None,
    prunable: PrunableLayers | None = None,
) -> None:
    """Cut ``model`` to ``plan``, in place.

    Outputs equal those of the model with removed channels set to 0.
    """
    # On the meta device, this gives the expected shapes of a slim file before it is loaded.
    if plan.tokens:
        apply_tokens(model, plan.tokens)
        prunable = None
    prunable = prunable or find_prunable_layers(model)
    check_plan(prunable, plan)
    by_layer = plan.by_layer()
    cut_layers = [layer for layer in prunable.layers if layer.name in by_layer]
    for layer in cut_layers:
        module = model.get_submodule(layer.name)
        _scale_kept(module, layer, by_layer[layer.name], channel_scales or {})
        slice_layer(module, layer, by_layer[layer.name])
    # Only after all layers are cut, because several layers may share a module.
    for adapter in dict.fromkeys(layer.adapter for layer in cut_layers):
        adapter.fix_shared_modules(model)


@torch.no_grad()
def slice_layer(module: nn.Module, layer: Layer, unit_plans: Mapping[UnitKind, UnitPlan]) -> None:
    for unit in layer.units:
        if unit.kind in unit_plans:
            layer.adapter.record_kept(module, unit, torch.tensor(unit_plans[unit.kind].kept))
    _slice(module, layer, unit_plans)
    widths = {u.kind: unit_plans[u.kind].width if u.kind in unit_plans else u.width for u in layer.units}
    layer.adapter.resize(module, widths)


def _scale_kept(
    module: nn.Module,
    layer: Layer,
    unit_plans: Mapping[UnitKind, UnitPlan],
    channel_scales: Mapping[UnitKey, Tensor],
) -> None:
    for unit in layer.units:
        unit_plan = unit_plans.get(unit.kind)
        if unit_plan is None:
            continue
        kept = kept_channels(unit_plan)
        channel_scale = kept.double() * exact_scale(unit, unit_plan.width)
        if unit.key in channel_scales:
            channel_scale = channel_scale * channel_scales[unit.key].to(channel_scale)
        if unit.constants:
            add_constant(module, unit, constant_lost(module, unit, channel_scale.reshape(-1)))
        if unit.gate is not None:
            layer.adapter.merge_gate(module, unit, channel_scale.clamp_min(_MIN_GATE) * kept)
        scale(module, unit, channel_scale)


def _slice(module: nn.Module, layer: Layer, unit_plans: Mapping[UnitKind, UnitPlan]) -> None:
    removed: dict[tuple[str, int], list[Tensor]] = {}
    order: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
    for unit in layer.units:
        if unit.kind not in unit_plans:
            continue
        unshared = unit_plans[unit.kind].unshared
        for axis in unit.axes if unshared else ():
            if axis.shared:  # each head gets a copy
                parameter = module.get_parameter(axis.tensor)
                copies = [unit.heads if dim == axis.dim else 1 for dim in range(parameter.dim())]
                _replace(module, axis.tensor, parameter.detach().repeat(copies))
        gone = ~kept_channels(unit_plans[unit.kind])
        # q, k and v share the rows of qkv: rows of all units are collected first, then cut at once.
        for axis in axes_of(unit):
            first, last = axis.heads or (0, unit.heads)
            if axis.shared and unshared:
                axis = replace(axis, shared=False)
            elif axis.shared:
                last = first + 1
            rows, cut_here, place = (
                axis.rows(unit.heads, unit.width),
                gone[first:last],
                (axis.tensor, axis.dim),
            )
            removed.setdefault(place, []).append(rows[cut_here].flatten())
            stays = rows[~cut_here].flatten()
            # The layer reads channels by their new numbers. If channels of a head are not side by side and
            # heads keep different channels, that order differs from the order in memory.
            number = (~cut_here).cumsum(1)[..., None] - 1
            moved = rows + (number - torch.arange(unit.width)[:, None]) * axis.channel_step
            order.setdefault(place, []).append(
                (stays.sort().values, stays[moved[~cut_here].flatten().argsort()])
            )
    # Row numbers refer to the uncut tensor, so each dimension is cut only once.
    for (name, dim), gone_parts in removed.items():
        tensor = tensor_of(module, name)
        keep = torch.ones(tensor.shape[dim], dtype=torch.bool)
        keep[torch.cat(gone_parts)] = False
        source = torch.arange(len(keep))
        for slots, entries in order[name, dim]:
            source[slots] = entries
        _replace(module, name, tensor.index_select(dim, source[keep].to(tensor.device)))


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner_name, _, tensor_name = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    old, tensor = getattr(owner, tensor_name), tensor.contiguous()
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
    setattr(owner, tensor_name, tensor)
    _update_sizes(owner)


def _update_sizes(owner: nn.Module) -> None:
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = owner.weight.shape
    elif isinstance(owner, nn.ConvTranspose2d):
        owner.in_channels = owner.weight.shape[0]
    elif isinstance(owner, nn.Conv2d):
        if owner.groups == owner.out_channels:  # depthwise
            owner.groups = owner.weight.shape[0]
        owner.out_channels, owner.in_channels = owner.weight.shape[0], owner.weight.shape[1] * owner.groups
    elif isinstance(owner, _BatchNorm):
        assert owner.running_mean is not None
        owner.num_features = len(owner.running_mean)
