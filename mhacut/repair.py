"""Repair: a model and a plan in, the same model out with removed channels dead and their work taken over.

Still of the dense model's shape, so that the cut afterwards is a mere slice. Ours; the algebra is in
:mod:`mhacut.tensor.refit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Layer, Unit
from mhacut.options import Temperature
from mhacut.plan import Plan, UnitPlan
from mhacut.surgery import Anatomy, UnitKey, temperature_factor
from mhacut.taps import listening
from mhacut.tensor.moments import Moments
from mhacut.tensor.refit import refit_linear, refit_logits
from mhacut.tensor.selection import select_channels, select_logit_channels


@dataclass(frozen=True)
class UnitRepair:
    """How the repair of one unit went."""

    plan: UnitPlan
    """What it keeps: the plan's channels, or as many of repair's own choice."""

    ridge: float
    """Relative; infinite where refitting did not help and was left out."""
    error: float
    """Squared error on held-back images over that of plainly removing the channels; of the logits for qk, of
    the layer's output otherwise."""


@torch.no_grad()
def repair(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan,
    images: Tensor,
    *,
    stages: int,
    batch_size: int,
    temperature: Temperature = "kept",
    reselect: bool = False,
    held_back: float = 0.25,
    progress: Callable[[int, int], None] | None = None,
) -> Mapping[UnitKey, UnitRepair]:
    """Refit ``model`` in place for ``plan``: removed channels are dead, kept ones stand in for them.

    Layers are repaired in ``stages`` groups from the input on, each on the activations of the network that
    the earlier groups left behind.

    Args:
        model: the dense model, eval mode, float32, on the device to work on.
        anatomy: of ``model``.
        plan: units that keep everything are skipped.
        images: [n, C, H, W], normalised.
        stages: passes over the images; more follow the cut network more closely.
        batch_size: images at a time.
        temperature: of the softmax, where refitting the logits does not help.
        reselect: keep the plan's widths, but choose the channels anew: those that serve best after the refit.
        held_back: share of the images that choose the ridge instead of being fitted.
        progress: called after every batch with (images done, images in all), over all stages.
    """
    cut_units = {unit_plan.key: unit_plan for unit_plan in plan if not unit_plan.keeps_all}
    layers = [layer for layer in anatomy.layers if any(unit.key in cut_units for unit in layer.units)]
    stages = min(stages, len(layers))
    bounds = [round(index * len(layers) / stages) for index in range(stages + 1)] if stages else []
    held = max(1, round(held_back * len(images))) if len(images) > 1 else 0
    report: dict[UnitKey, UnitRepair] = {}
    for stage, (first, last) in enumerate(pairwise(bounds)):
        group = layers[first:last]
        units = [unit for layer in group for unit in layer.units if unit.key in cut_units]
        told = _counter(progress, stage * len(images), stages * len(images))
        seen = _gather(model, units, group, images[held:], batch_size, told)
        unseen = _gather(model, units, group, images[:held], batch_size, told) if held else seen
        for unit in units:
            moments = seen[unit.key], unseen[unit.key]
            unit_plan = cut_units[unit.key]
            if reselect:
                unit_plan = _reselected(model, unit, unit_plan, *moments)
            report[unit.key] = _repair_unit(model, unit, unit_plan, *moments, temperature)
    return report


def _counter(progress: Callable[[int, int], None] | None, done: int, total: int) -> Callable[[int], None]:
    """Called with the size of each batch, tells ``progress`` how many images are done since ``done``."""

    def count(images: int) -> None:
        nonlocal done
        done += images
        if progress is not None:
            progress(done, total)

    return count


class _Enough(Exception):
    """All layers of interest have run."""


def _gather(
    model: nn.Module,
    units: list[Unit],
    group: list[Layer],
    images: Tensor,
    batch_size: int,
    told: Callable[[int], None],
) -> dict[UnitKey, tuple[Moments, ...]]:
    """Moments of what repair needs: (output,) or (hidden,) over all heads at once; (query, key) per head."""
    sums: dict[tuple[UnitKey, str], Moments] = {}

    def take(unit: Unit, name: str, activation: Tensor) -> None:
        if name == "value":
            return
        if unit.kind == "qk":
            x = activation.movedim(-2, 1).flatten(2, -2)  # (B, H, N, d)
            if name == "key":
                x = x - x.mean(dim=-2, keepdim=True)
            x = x.transpose(0, 1).flatten(1, 2)  # (H, B * N, d)
        else:
            x = activation.flatten(-2).flatten(0, -2)  # (rows, H * d)
        moments = Moments.of(x)
        key = unit.key, name
        sums[key] = sums[key] + moments if key in sums else moments

    waiting: set[nn.Module] = set()

    def stop(module: nn.Module, args: object, output: object) -> None:
        waiting.discard(module)
        if not waiting:
            raise _Enough

    device = next(model.parameters()).device
    modules = [model.get_submodule(layer.name) for layer in group]
    handles = [module.register_forward_hook(stop) for module in modules]
    try:
        with listening(model, units, take):
            for start in range(0, len(images), batch_size):
                waiting.update(modules)
                with suppress(_Enough):
                    model(images[start : start + batch_size].to(device))
                told(len(images[start : start + batch_size]))
    finally:
        for handle in handles:
            handle.remove()
    wanted = {"qk": ("query", "key"), "v": ("output",), "hidden": ("hidden",)}
    return {unit.key: tuple(sums[unit.key, name] for name in wanted[unit.kind]) for unit in units}


def _reselected(
    model: nn.Module,
    unit: Unit,
    unit_plan: UnitPlan,
    fit: tuple[Moments, ...],
    held: tuple[Moments, ...],
) -> UnitPlan:
    every = [seen + unseen for seen, unseen in zip(fit, held, strict=True)]
    if unit.kind == "qk":
        kept = select_logit_channels(every[0].energy, every[1].energy, unit_plan.width)
    else:
        moment = every[0].energy if unit.readout_bias is None else every[0].covariance
        kept = select_channels(moment, _columns(model, unit), unit.heads, unit_plan.width)
    return replace(unit_plan, kept=tuple(map(tuple, kept.tolist())))


def _columns(model: nn.Module, unit: Unit) -> Tensor:
    """The weights that read the unit's channels, [out, heads * width], float64."""
    assert unit.readout is not None
    weight = model.get_submodule(unit.layer).get_parameter(unit.readout.tensor).movedim(unit.readout.dim, -1)
    size = unit.heads * unit.width
    return weight[..., unit.readout.offset : unit.readout.offset + size].reshape(-1, size).double()


def _repair_unit(
    model: nn.Module,
    unit: Unit,
    unit_plan: UnitPlan,
    fit: tuple[Moments, ...],
    held: tuple[Moments, ...],
    temperature: Temperature,
) -> UnitRepair:
    layer = model.get_submodule(unit.layer)
    device = fit[0].total.device
    kept = torch.tensor(unit_plan.kept, device=device)
    if unit.kind == "qk":
        plain = temperature_factor(unit, unit_plan.width, temperature)
        logits = refit_logits((fit[0], fit[1]), (held[0], held[1]), kept, plain)
        for axis in unit.gain_axes:
            rows = layer.get_parameter(axis.tensor).movedim(axis.dim, 0)[
                axis.offset : axis.offset + unit.heads * unit.width
            ]
            rows = rows.view(unit.heads, unit.width, *rows.shape[1:])  # (H, d, ...), a view
            for head in range(unit.heads):
                chosen = rows[head, kept[head]].double()
                rows[head] = 0
                rows[head, kept[head]] = torch.tensordot(logits.mixing[head].T, chosen, dims=1).to(rows.dtype)
        return UnitRepair(unit_plan, logits.ridge, logits.error)

    assert unit.readout is not None
    flat = (kept + unit.width * torch.arange(unit.heads, device=device)[:, None]).reshape(-1)
    gone = torch.ones(unit.heads * unit.width, dtype=torch.bool, device=device)
    gone[flat] = False
    weight = layer.get_parameter(unit.readout.tensor).movedim(unit.readout.dim, -1)
    columns = weight[..., unit.readout.offset : unit.readout.offset + len(gone)]
    matrix = _columns(model, unit)
    bias = None if unit.readout_bias is None else layer.get_parameter(unit.readout_bias)
    linear = refit_linear(fit[0], held[0], flat, matrix, constant=bias is not None)
    lost = matrix[:, gone]
    columns[..., flat] += (lost @ linear.prediction).to(columns.dtype).reshape(*columns.shape[:-1], -1)
    columns[..., gone] = 0
    if bias is not None:
        bias.add_((lost @ linear.constant).to(bias.dtype))
    return UnitRepair(unit_plan, linear.ridge, linear.error)
