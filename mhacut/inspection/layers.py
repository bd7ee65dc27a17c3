"""What is in a checkpoint: its layers and heads, what they cost, how alike and how few their channels are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mhacut.adapters.base import Layer, Unit
from mhacut.checkpoint.layers import LayerReader
from mhacut.checkpoint.load import LoadedModel, Outline
from mhacut.checkpoint.preprocessing import resolve_preprocessing
from mhacut.data import Preprocessing
from mhacut.inspection.heads import HeadFindings, find
from mhacut.options.base import PreprocessingOptions
from mhacut.plan import Basis, UnitKind, UnitPlan
from mhacut.pruning.calibrate import Calibration
from mhacut.pruning.weight_moments import white_moments
from mhacut.surgery.find import UnitKey, find_prunable_layers
from mhacut.surgery.flops import count_parameters, measure_flops_by_module, weightless
from mhacut.surgery.info import classifier_size, not_prunable

BY_WEIGHTS = "weights alone, inputs taken as white"
"""What findings rest on where there were no images."""


@dataclass(frozen=True)
class UnitReport:
    """q/k or v of one attention layer, or the hidden channels of one MLP."""

    kind: UnitKind
    head_count: int
    """1 for ``hidden``; fewer than the layer's where channels of several heads go as one."""
    now: int
    """Channels per head (of the whole MLP for ``hidden``)."""
    dense: int
    """Before any cut; equal to ``now`` in a dense file."""
    basis: Basis
    """What ``kept`` counts."""
    kept: tuple[tuple[int, ...], ...] | None
    """Per head, of the dense channels those that a slim file still has; None where nothing was cut."""
    heads: tuple[HeadFindings, ...]
    """Empty where nothing was looked for: from shapes alone, and for hidden channels."""


@dataclass(frozen=True)
class LayerReport:
    """One attention or MLP that can be cut."""

    name: str
    """Module name, ``blocks.0.attn``."""
    module: str
    """Its class."""
    heads: int | None
    """None for an MLP."""
    units: Mapping[UnitKind, UnitReport]
    """Of its units that can be cut."""
    not_prunable: Mapping[UnitKind, str]
    """Units that cannot, and why."""
    coupled_with: Mapping[UnitKind, UnitKind]
    """Kinds whose channels go with those of another."""
    flops: int
    """Of the whole layer, as it stands."""
    share: float
    """Of the model's FLOPs, in 0..1."""
    parameters: int
    """Of the whole layer, as it stands."""
    parameter_share: float
    """Of the model's parameters, in 0..1."""


@dataclass(frozen=True)
class Inspection:
    """What is in a checkpoint."""

    source: str
    architecture: str
    input_size: tuple[int, int, int]
    """[C, H, W], for which FLOPs are counted."""
    classes: int
    """0 for a model that gives features."""
    flops: int
    parameters: int
    dtypes: tuple[str, ...]
    """Of the file's floating-point tensors."""
    layers: tuple[LayerReport, ...]
    not_prunable: tuple[str, ...]
    """What could not be cut exactly, or is never touched, and why."""
    preprocessing: Preprocessing
    history: tuple[Mapping[str, Any], ...]
    """What a slim file says of the commands that made it, oldest first; untrusted. Empty for a dense file."""
    slim: bool
    """Whether the file is one that mhacut cut."""
    judged_by: str | None
    """What findings of heads rest on: images, or :data:`BY_WEIGHTS`; None from shapes alone."""


@dataclass(frozen=True)
class Evidence:
    """Activations of the very model that is inspected."""

    calibration: Calibration
    description: str
    """Of the images."""


def inspect_model(
    opened: LoadedModel | Outline,
    *,
    shapes_only: bool = False,
    evidence: Evidence | None = None,
    ranked: Callable[[str], bool] = lambda layer: False,
    preprocessing: PreprocessingOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Describe ``opened``.

    Args:
        opened: a checkpoint; of an outline, layers are read one at a time.
        shapes_only: read no weights, and say nothing of single heads but their widths.
        evidence: what to judge heads by; None is the weights alone.
        ranked: whether the channels of a layer of that name are to be ranked, which takes most of the time.
        preprocessing: overrides what the checkpoint states; FLOPs are counted at its image size.
        progress: called with (layers done, layers in all).

    Raises:
        UnsupportedModelError: it has no attention that can be cut, or one that is not known.
        CheckpointError: weights cannot be read.
    """
    model = opened.model
    prunable = find_prunable_layers(model)
    resolved = resolve_preprocessing(opened, preprocessing or PreprocessingOptions())
    countable = weightless(model) if isinstance(opened, Outline) else model
    flops = measure_flops_by_module(countable, resolved.input_size)
    parameters = count_parameters(model)
    plans = {} if opened.record is None else {unit.key: unit for unit in opened.record.plan}
    layer_of = _reader(opened, needed=not shapes_only)
    layers = []
    for done, layer in enumerate(prunable.layers):
        module: Any = model.get_submodule(layer.name)
        is_attention = layer.adapter.family == "attention"
        own, held = flops.get(layer.name, 0), count_parameters(module)
        found: dict[UnitKey, tuple[HeadFindings, ...]] = {}
        if is_attention and not shapes_only:
            with layer_of(layer.name) as read:
                found = _findings(read, layer, evidence, ranked(layer.name))
        layers.append(
            LayerReport(
                name=layer.name,
                module=type(module).__name__,
                heads=_heads(layer, module) if is_attention else None,
                units={
                    unit.kind: _unit_report(unit, plans.get(unit.key), found.get(unit.key, ()))
                    for unit in layer.units
                },
                not_prunable=dict(layer.not_prunable),
                coupled_with=dict(layer.coupled_with),
                flops=own,
                share=own / flops[""],
                parameters=held,
                parameter_share=held / parameters,
            )
        )
        if progress is not None:
            progress(done + 1, len(prunable.layers))
    told = BY_WEIGHTS if evidence is None else evidence.description
    return Inspection(
        source=opened.source,
        architecture=opened.identity.architecture,
        input_size=resolved.input_size,
        classes=classifier_size(model),
        flops=flops[""],
        parameters=parameters,
        dtypes=tuple(sorted({_name(dtype) for dtype in opened.dtypes.values() if dtype.is_floating_point})),
        layers=tuple(layers),
        not_prunable=not_prunable(prunable),
        preprocessing=resolved,
        history=() if opened.record is None else opened.record.history,
        slim=opened.record is not None,
        judged_by=None if shapes_only else told,
    )


def _reader(
    opened: LoadedModel | Outline, *, needed: bool
) -> Callable[[str], AbstractContextManager[nn.Module]]:
    """What gives a layer with its numbers in it."""
    if isinstance(opened, Outline) and needed:
        return LayerReader(opened).layer
    return lambda name: nullcontext(opened.model.get_submodule(name))


@torch.no_grad()
def _findings(
    module: nn.Module, layer: Layer, evidence: Evidence | None, ranked: bool
) -> dict[UnitKey, tuple[HeadFindings, ...]]:
    found = {}
    for unit in layer.units:
        if unit.kind == "hidden":  # of a block with an MLP inside
            continue
        if evidence is None:
            seen = white_moments(module, unit)
            if seen is None:
                continue
            moments, similarity = seen
        else:
            moments = evidence.calibration.moments[unit.key]
            similarity = evidence.calibration.statistics[unit.key].redundancy
        found[unit.key] = find(module, unit, moments, similarity, ranked=ranked)
    return found


def _unit_report(unit: Unit, plan: UnitPlan | None, found: tuple[HeadFindings, ...]) -> UnitReport:
    if plan is None or plan.keeps_all:
        return UnitReport(unit.kind, unit.heads, unit.width, unit.width, "channel", None, found)
    return UnitReport(unit.kind, unit.heads, unit.width, plan.dense_width, plan.basis, plan.kept, found)


def _heads(layer: Layer, module: Any) -> int | None:
    """Of an attention; what nothing can be cut of may not say."""
    if layer.units:
        return max(unit.heads for unit in layer.units)
    return getattr(module, "num_heads", None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
