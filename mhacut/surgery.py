"""The cut: a model and a plan in, the same model with smaller tensors out. And its masked twin."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mhacut.adapters.base import NORM_TENSORS, ChannelAxis, Layer, Unit
from mhacut.adapters.registry import (
    adapter_for,
    is_attention,
    is_pooling_head,
    is_position_bias,
    looks_like_attention,
    looks_like_mlp,
    why_not_cut,
)
from mhacut.errors import PlanError, UnsupportedModelError
from mhacut.options import Temperature
from mhacut.plan import Basis, Plan, UnitKind, UnitPlan

UnitKey = tuple[str, UnitKind]
_LEAST_GATE = 1e-60
"""What can be merged is positive. A kept channel whose gain was trained to 0 or below is gone in the masked
twin; so much of it is left in the cut. (Features get the sixth root, 1e-10: little beside 1e-6.)"""


@dataclass(frozen=True)
class Anatomy:
    """What of a model can be cut."""

    layers: tuple[Layer, ...]
    """In the order of the model's modules."""
    left_alone: tuple[str, ...]
    """Modules outside these layers that hold channels but are not cut: name, class and reason."""

    def units(self, kinds: Iterable[UnitKind] = ("qk", "v", "hidden")) -> tuple[Unit, ...]:
        wanted = set(kinds)
        return tuple(unit for layer in self.layers for unit in layer.units if unit.kind in wanted)

    def unit(self, key: UnitKey) -> Unit:
        """The unit named ``key``; a :class:`PlanError` when the model has none."""
        for unit in self.units():
            if unit.key == key:
                return unit
        raise PlanError(f"the model has no unit {key[1]!r} in a layer {key[0]!r}")


def dissect(model: nn.Module) -> Anatomy:
    """The layers of ``model`` that can be cut, as their adapters describe them.

    Raises:
        UnsupportedModelError: the model holds an attention class that is not registered, or no attention.
    """
    layers: list[Layer] = []
    left_alone: list[str] = []
    refused: list[str] = []
    unknown: dict[str, str] = {}
    unknown_mlps: dict[str, list[str]] = {}
    seen: dict[int, str] = {}

    def walk(name: str, module: nn.Module) -> None:
        cls = type(module)
        adapter = adapter_for(module)
        if adapter is None and is_pooling_head(module):
            left_alone.append(f"{name} ({cls.__name__}): a pooling head is left alone")
            return
        if is_position_bias(module):
            return
        if adapter is not None:
            if id(module) in seen:
                raise UnsupportedModelError(
                    f"{name} and {seen[id(module)]} are one shared module; not supported"
                )
            seen[id(module)] = name
            layers.append(adapter.describe(name, module))
            return
        before, refused_before = len(layers), len(refused)
        for child_name, child in module.named_children():
            walk(f"{name}.{child_name}" if name else child_name, child)
        families = {layer.adapter.family for layer in layers[before:]}
        # An MLP inside does not make an attention known: position biases of windows come from one.
        holds_one = "attention" in families or len(refused) > refused_before
        if is_attention(module) or (looks_like_attention(module) and not holds_one):
            refused.append(name)
            unknown.setdefault(f"{cls.__module__}.{cls.__qualname__}", name)
        elif not families and looks_like_mlp(module):
            unknown_mlps.setdefault(cls.__name__, []).append(name)

    walk("", model)
    if unknown:
        found = ", ".join(f"{cls} (first at {name})" for cls, name in unknown.items())
        raise UnsupportedModelError(
            f"attention class not supported: {found}; nothing is cut beside attention that mhacut does not "
            "know. `mhacut models` lists what can be cut"
        )
    if not any(layer.adapter.family == "attention" for layer in layers):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention layer mhacut can cut; "
            "`mhacut models` lists what can be cut"
        )
    for mlp, names in unknown_mlps.items():
        of_several = f" ({len(names)} layers)" if len(names) > 1 else ""
        left_alone.append(f"{names[0]} ({mlp}): {why_not_cut(mlp)}{of_several}")
    return Anatomy(tuple(layers), tuple(left_alone))


def exact_gain(unit: Unit, width: int) -> float:
    """What a cut to ``width`` must multiply into the gain axes so that dead channels may go unnoticed.

    A softmax layer derives its scale from its width: at k of d channels its logits grow by sqrt(d / k).
    """
    return float((width / unit.width) ** 0.5) if unit.softmax_scaled else 1.0


def temperature_factor(unit: Unit, width: float, temperature: Temperature, basis: Basis) -> float:
    """Factor on the logits of the masked dense model at ``width``: ``kept`` is 1/sqrt(kept width).

    That makes up for channels of the logits that went. Principal ones that stay have the logits' energy
    already: their temperature is the dense one.
    """
    if temperature == "dense" or basis == "principal" or not unit.softmax_scaled:
        return 1.0
    return float((unit.width / width) ** 0.5)


@torch.no_grad()
def cut(model: nn.Module, plan: Plan, gains: Mapping[UnitKey, Tensor] | None = None) -> None:
    """Slice ``model`` in place to ``plan``; afterwards it equals :func:`masked_tensors` at the same gains.

    Works on the meta device too, which is how the shapes of a slim file are checked before it is loaded.

    Args:
        model: any model :func:`dissect` accepts, the plan's dense model.
        plan: units not named stay whole.
        gains: [heads, dense_width] per unit, multiplied into the kept channels' contribution (their logits
            for qk); missing means 1. Relative to the dense model: the softmax temperature stays its own.

    Raises:
        PlanError: the plan is not for this model.
    """
    anatomy = dissect(model)
    check_plan(anatomy, plan)
    by_layer = plan.by_layer()
    for layer in anatomy.layers:
        unit_plans = by_layer.get(layer.name)
        if unit_plans is None:
            continue
        module = model.get_submodule(layer.name)
        for unit in layer.units:
            unit_plan = unit_plans.get(unit.kind)
            if unit_plan is None:
                continue
            gain = kept_channels(unit_plan).double() * exact_gain(unit, unit_plan.width)
            if gains is not None and unit.key in gains:
                gain = gain * gains[unit.key].to(gain)
            _fold_constants(module, unit, gain)
            if unit.gate is not None:
                layer.adapter.merge_gate(module, unit, gain.clamp_min(_LEAST_GATE) * kept_channels(unit_plan))
            scale(module, unit, gain)
            layer.adapter.keep(module, unit, torch.tensor(unit_plan.kept))
        _slice(module, layer, unit_plans)
        widths = {u.kind: unit_plans[u.kind].width if u.kind in unit_plans else u.width for u in layer.units}
        resized = layer.adapter.resize(module, widths)
        if resized is not module:
            model.set_submodule(layer.name, resized)
    for adapter in dict.fromkeys(layer.adapter for layer in anatomy.layers if layer.name in by_layer):
        adapter.settle(model)


def masked_tensors(model: nn.Module, anatomy: Anatomy, gains: Mapping[UnitKey, Tensor]) -> dict[str, Tensor]:
    """The tensors of the masked twin: those of ``model`` with each channel's contribution times its gain.

    A gain of 0 removes a channel exactly as :func:`cut` would. Differentiable in the gains; meant for
    :func:`run_with`. Tensors that no gain touches are left out.

    Args:
        model: the dense model.
        anatomy: of that model.
        gains: [heads, width] per unit.
    """
    masked: dict[str, Tensor] = {}
    for layer in anatomy.layers:
        for unit in layer.units:
            if unit.key not in gains:
                continue
            module = model.get_submodule(layer.name)
            gain = gains[unit.key].reshape(-1)  # (H * d)
            if unit.gate is not None:
                masked[f"{layer.name}.{unit.gate}"] = gain
            if unit.constants:
                bias = f"{layer.name}.{unit.readout_bias}"
                masked[bias] = model.get_parameter(bias) + _constant_lost(module, unit, gain)
            scaled = (part for axis in unit.gain_axes for part in _scaled_with(axis))
            for axis in scaled:
                name = f"{layer.name}.{axis.tensor}"
                tensor = masked.get(name)
                if tensor is None:
                    tensor = model.get_parameter(name)
                masked[name] = _scaled(tensor, unit, axis, gain)
    return masked


def run_with(model: nn.Module, tensors: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """What ``model`` gives with ``tensors`` in place of its own of these names; left as it was.

    One of the names of a module will do; tensors that several modules share need all of theirs.
    """
    # Where torch ties them by itself, it leaves one behind in a module of several names.
    outputs: Tensor = torch.func.functional_call(model, dict(tensors), (images,), tie_weights=False)
    return outputs


@torch.no_grad()
def scale(module: nn.Module, unit: Unit, gain: Tensor) -> None:
    """Multiply the unit's channels by ``gain`` [heads, width], in place, where that scales what they do."""
    for axis in unit.gain_axes:
        for part in _scaled_with(axis):
            _scale(module, unit, part, gain)


def set_gate(module: nn.Module, unit: Unit, gain: Tensor | None) -> None:
    """Put ``gain`` [heads, width] into the unit's gate; None opens it."""
    assert unit.gate is not None
    owner, _, name = unit.gate.rpartition(".")
    setattr(module.get_submodule(owner), name, None if gain is None else gain.reshape(-1))


def readers(module: nn.Module, unit: Unit) -> Tensor:
    """The weights that read the unit's channels in the layer ``module``, [out, heads * width], float64.

    With the factors of a scale or a batch norm behind them, so that they tell errors of what the layer gives.
    Of a channel that is read at several places (by a convolution, or as several queries have it), [places *
    out, heads * width], those of a place together: squares sum to that of one place of the output, if errors
    at the places are independent.
    """
    assert unit.readout is not None
    columns = readout(module, unit).detach().double()
    reader = module.get_submodule(unit.readout.tensor.rpartition(".")[0])
    if isinstance(reader, nn.ConvTranspose2d):
        assert unit.readout_scale is None
        assert unit.readout_norm is None
        columns = columns / math.prod(reader.stride) ** 0.5  # of an error, spread over so many more places
    if unit.readout_scale is not None:
        columns = module.get_parameter(unit.readout_scale).detach().double()[:, None] * columns
    if unit.readout_norm is None:
        return columns
    return norm_factor(module.get_submodule(unit.readout_norm))[:, None] * columns


def readout(module: nn.Module, unit: Unit) -> Tensor:
    """As :func:`readers`, but the parameter itself, of its own dtype."""
    assert unit.readout is not None
    weight = module.get_parameter(unit.readout.tensor).movedim(unit.readout.dim, -1)
    columns = unit.readout.rows(unit.heads, unit.width).to(weight.device)  # (H, d, copies)
    # (..., out, H, d, copies) -> (copies, ..., out, H * d)
    read = weight.movedim(0, -2)[..., columns].movedim(-1, 0).flatten(-2)
    return read.reshape(-1, read.shape[-1])


@torch.no_grad()
def add_constant(module: nn.Module, unit: Unit, constant: Tensor) -> None:
    """Add ``constant`` [out], or [places * out], to what the columns of the unit's readout give."""
    if unit.readout_bias is not None:
        bias = module.get_parameter(unit.readout_bias)
        bias.add_(constant.view(-1, len(bias)).sum(0).to(bias))
    elif unit.readout_norm is not None:
        mean = module.get_submodule(unit.readout_norm).running_mean
        assert isinstance(mean, Tensor)
        mean.sub_(constant.to(mean))


def norm_factor(norm: nn.Module) -> Tensor:
    """What a batch norm in eval mode multiplies by, [C], float64."""
    assert isinstance(norm, _BatchNorm)
    assert norm.running_var is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    return factor if norm.weight is None else factor * norm.weight.detach().double()


@torch.no_grad()
def rotate(module: nn.Module, unit: Unit, basis: Tensor) -> None:
    """Change the basis of the unit's channels in place; the layer computes what it did.

    Args:
        module: the layer.
        unit: one that is ``rotatable``.
        basis: A, [H, d, d], invertible: gain axes are multiplied by A, the other axes by A^-T. The same for
            all heads of a unit whose heads go together.
    """
    assert unit.rotatable
    inverse = torch.linalg.inv(basis).mT
    for axis in unit.axes:
        mix(module, unit, axis, basis if axis in unit.gain_axes else inverse)


@torch.no_grad()
def mix(module: nn.Module, unit: Unit, axis: ChannelAxis, mixing: Tensor) -> None:
    """Multiply the unit's channels in one tensor by ``mixing`` [H, d, d], with the batch norm behind them.

    A batch norm scales single channels. Its scale is put into the rows first, and then made anew so that it
    changes nothing; its variances become those of the mixed rows, had the rows been independent, so that it
    finds in training about what it says.
    """
    linear, mixing = [axis], _of_heads(axis, mixing)
    if axis.norm is not None:
        norm = module.get_submodule(axis.norm)
        factor = norm_factor(norm)
        factor = factor[axis.rows(unit.heads, unit.width).to(factor.device)]  # (H, d, copies)
        for part in (axis, _of_norm(axis, "running_mean")):
            rows = channels_of(module, unit, part).double()
            set_channels(module, unit, part, rows * factor.view(*factor.shape, *[1] * (rows.dim() - 3)))
        bias = replace(axis, tensor=axis.tensor.removesuffix("weight") + "bias", dim=0, norm=None)
        if _has(module, bias.tensor):  # moves behind the factor into the norm's mean
            own, mean = (
                channels_of(module, unit, part).double() for part in (bias, _of_norm(axis, "running_mean"))
            )
            set_channels(module, unit, _of_norm(axis, "running_mean"), mean - own * factor)
            set_channels(module, unit, bias, torch.zeros_like(own))
        variance = channels_of(module, unit, _of_norm(axis, "running_var")).double() * factor.square()
        mixed = torch.einsum("hij,hj...->hi...", mixing.square(), variance)
        set_channels(module, unit, _of_norm(axis, "running_var"), mixed)
        mixed = channels_of(module, unit, _of_norm(axis, "running_var")).double()  # as it was rounded
        set_channels(module, unit, _of_norm(axis, "weight"), (mixed + _eps(norm)).sqrt())
        linear += [_of_norm(axis, "running_mean"), _of_norm(axis, "bias")]
    for part in linear:
        rows = channels_of(module, unit, part).double()
        set_channels(module, unit, part, torch.einsum("hij,hj...->hi...", mixing, rows))


def axes_of(unit: Unit) -> tuple[ChannelAxis, ...]:
    """``unit.axes``, and what of batch norms behind them belongs to the channels."""
    axes: list[ChannelAxis] = []
    for axis in unit.axes:
        axes.append(axis)
        if axis.norm is not None:
            axes += [_of_norm(axis, name) for name in NORM_TENSORS]
    return tuple(axes)


def channels_of(module: nn.Module, unit: Unit, axis: ChannelAxis) -> Tensor:
    """What of one tensor belongs to the unit's channels: a copy, [H, d, copies, ...]."""
    tensor = _tensor(module, axis.tensor).detach().movedim(axis.dim, 0)
    return tensor[axis.rows(unit.heads, unit.width).to(tensor.device)]


def set_channels(module: nn.Module, unit: Unit, axis: ChannelAxis, channels: Tensor) -> None:
    """Write what :func:`channels_of` gives."""
    tensor = _tensor(module, axis.tensor).detach().movedim(axis.dim, 0)
    tensor[axis.rows(unit.heads, unit.width).to(tensor.device)] = channels.to(tensor.dtype)


def check_plan(anatomy: Anatomy, plan: Plan) -> None:
    """Raise a :class:`PlanError` unless every unit of ``plan`` is a unit of the model, of the same size."""
    for unit_plan in plan:
        unit = anatomy.unit(unit_plan.key)
        if (unit.heads, unit.width) != (unit_plan.heads, unit_plan.dense_width):
            raise PlanError(
                f"plan of {unit.layer!r} ({unit.kind}): the model has {unit.heads} heads of {unit.width} "
                f"channels, the plan is for {unit_plan.heads} of {unit_plan.dense_width}"
            )
        shared = [axis.tensor for axis in unit.axes if axis.shared]
        if shared and not unit_plan.unshared and len(set(unit_plan.kept)) > 1:
            or_unshared = ", or the plan says unshared" if unit.can_unshare else ""
            raise PlanError(
                f"plan of {unit.layer!r} ({unit.kind}): its heads share {', '.join(shared)}: they keep the "
                f"same channels{or_unshared}; found different ones"
            )
        if unit_plan.unshared and not unit.can_unshare:
            why = "what its heads share cannot be copied" if shared else "its heads share nothing"
            raise PlanError(f"plan of {unit.layer!r} ({unit.kind}): unshared, but {why}")


def _tensor(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of ``module``."""
    owner, _, last = name.rpartition(".")
    tensor = getattr(module.get_submodule(owner), last)
    assert isinstance(tensor, Tensor), name
    return tensor


def _has(module: nn.Module, name: str) -> bool:
    owner, _, last = name.rpartition(".")
    return isinstance(getattr(module.get_submodule(owner), last, None), Tensor)


def _eps(norm: nn.Module) -> float:
    assert isinstance(norm, _BatchNorm)
    return norm.eps


def _of_norm(axis: ChannelAxis, tensor: str) -> ChannelAxis:
    """Where the channels of ``axis`` lie in one tensor of the batch norm behind it."""
    return replace(axis, tensor=f"{axis.norm}.{tensor}", dim=0, norm=None)


def _scaled_with(axis: ChannelAxis) -> tuple[ChannelAxis, ...]:
    """What a gain multiplies: the rows, or the batch norm behind them.

    In training a batch norm would undo what is done to the rows.
    """
    if axis.norm is None:
        return (axis,)
    return _of_norm(axis, "weight"), _of_norm(axis, "bias")


def _of_heads(axis: ChannelAxis, of_all: Tensor) -> Tensor:
    """What of [H, ...] belongs to the heads whose channels lie along ``axis``."""
    if axis.shared:  # all alike
        return of_all[:1]
    return of_all if axis.heads is None else of_all[slice(*axis.heads)]


def _scaled(tensor: Tensor, unit: Unit, axis: ChannelAxis, gain: Tensor) -> Tensor:
    """``tensor`` with the unit's entries along ``axis`` times ``gain`` [heads * width]."""
    size = tensor.shape[axis.dim]
    rows = axis.rows(unit.heads, unit.width).to(gain.device)
    gain = _of_heads(axis, gain.view(unit.heads, unit.width)).reshape(-1)
    factor = gain.new_ones(size).index_copy(0, rows.flatten(), gain.repeat_interleave(rows.shape[-1]))
    shape = [1] * tensor.dim()
    shape[axis.dim] = size
    return tensor * factor.view(shape).to(tensor)


def _scale(module: nn.Module, unit: Unit, axis: ChannelAxis, gain: Tensor) -> None:
    parameter = module.get_parameter(axis.tensor)
    scaled = _scaled(parameter.detach().double(), unit, axis, gain.reshape(-1).to(parameter.device))
    parameter.copy_(scaled.to(parameter.dtype))


def kept_channels(unit_plan: UnitPlan) -> Tensor:
    """Which channels stay, [heads, dense_width], bool."""
    kept = torch.zeros(unit_plan.heads, unit_plan.dense_width, dtype=torch.bool)
    for head, channels in enumerate(unit_plan.kept):
        kept[head, list(channels)] = True
    return kept


def _constant_lost(module: nn.Module, unit: Unit, gain: Tensor) -> Tensor:
    """What the readout's bias must take up when channels are scaled by ``gain`` [heads * width]; [out]."""
    columns = readout(module, unit)
    lost = columns.new_zeros(len(columns))
    for axis in unit.constants:
        first, last = axis.heads or (0, unit.heads)
        own = module.get_parameter(axis.tensor)
        constant = own.repeat(last - first) if axis.shared else own
        part = slice(first * unit.width, last * unit.width)
        lost = lost + columns[:, part] @ (constant * (1 - gain[part].to(constant)))
    return lost


def _fold_constants(module: nn.Module, unit: Unit, gain: Tensor) -> None:
    if unit.constants:
        assert unit.readout_bias is not None
        add_constant(module, unit, _constant_lost(module, unit, gain.reshape(-1)))


def _unshare(module: nn.Module, unit: Unit) -> None:
    """A copy for each head of every tensor that heads share."""
    for axis in unit.axes:
        if axis.shared:
            parameter = module.get_parameter(axis.tensor)
            copies = [unit.heads if dim == axis.dim else 1 for dim in range(parameter.dim())]
            _replace(module, axis.tensor, parameter.detach().repeat(copies))


def _slice(module: nn.Module, layer: Layer, unit_plans: Mapping[UnitKind, UnitPlan]) -> None:
    """Index every tensor of the layer by what its units keep; several units may share a dimension."""
    removed: dict[tuple[str, int], list[Tensor]] = {}
    order: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
    for unit in layer.units:
        if unit.kind not in unit_plans:
            continue
        unshared = unit_plans[unit.kind].unshared
        if unshared:
            _unshare(module, unit)
        gone = ~kept_channels(unit_plans[unit.kind])
        for axis in axes_of(unit):
            first, last = axis.heads or (0, unit.heads)
            if axis.shared and unshared:
                axis = replace(axis, shared=False)
            elif axis.shared:
                last = first + 1
            rows, own, place = axis.rows(unit.heads, unit.width), gone[first:last], (axis.tensor, axis.dim)
            removed.setdefault(place, []).append(rows[own].flatten())
            stays = rows[~own].flatten()
            # Where channels are not side by side, heads that keep different ones leave another order behind
            # than the layer will read: that of channels numbered anew.
            number = (~own).cumsum(1)[..., None] - 1
            moved = rows + (number - torch.arange(unit.width)[:, None]) * axis.channel_step
            order.setdefault(place, []).append((stays.sort().values, stays[moved[~own].flatten().argsort()]))
    for (name, dim), gone_parts in removed.items():
        tensor = _tensor(module, name)
        keep = torch.ones(tensor.shape[dim], dtype=torch.bool)
        keep[torch.cat(gone_parts)] = False
        source = torch.arange(len(keep))
        for slots, entries in order[name, dim]:
            source[slots] = entries
        _replace(module, name, tensor.index_select(dim, source[keep].to(tensor.device)))


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Give a parameter or buffer of ``module`` another tensor."""
    owner_name, _, tensor_name = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    old, tensor = getattr(owner, tensor_name), tensor.contiguous()
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
    setattr(owner, tensor_name, tensor)
    _tell_size(owner)


def _tell_size(owner: nn.Module) -> None:
    """Linear, convolution and batch norm layers carry their sizes as attributes too."""
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
