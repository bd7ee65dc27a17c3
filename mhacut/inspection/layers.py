"""Widths, costs and channel redundancy of the layers and heads of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Layer, Unit
from mhacut.budget import format_flops
from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.preprocessing import Provenance, provenance, resolve_preprocessing
from mhacut.data import Preprocessing
from mhacut.linalg.moments import Moments
from mhacut.linalg.pca import effective_rank, falling_eigenvalues, logit_energies, output_energies
from mhacut.options.base import PreprocessingOptions
from mhacut.plan import UNIT_KINDS, Basis, LayerFamily, TokenPlan, UnitKey, UnitKind, UnitPlan
from mhacut.pruning.calibrate import Calibration
from mhacut.pruning.unit_moments import UnitMoments, white_moments
from mhacut.surgery.channels import effective_output_weights
from mhacut.surgery.find import PrunableLayers, classifier_size, find_prunable_layers
from mhacut.surgery.flops import count_parameters, measure_flops, measure_flops_by_module, weightless
from mhacut.surgery.tokens import tokens_of
from mhacut.text import dtype_name


@dataclass(frozen=True)
class HeadFindings:
    similarity: float
    """Mean absolute similarity of a channel to the head's other channels, in 0..1; 0 for unrelated
    channels."""
    rank99: int
    """Number of principal channels that hold 99 % of the energy of the logits (qk) or of the head's output
    (v)."""


def describe_heads(
    module: nn.Module, unit: Unit, moments: UnitMoments, similarity: Tensor
) -> tuple[HeadFindings, ...]:
    """Describe each head of ``unit``. ``similarity`` [H, d] compares a channel with others of its head."""
    ranks = effective_rank(_energies(module, unit, moments), 0.99)  # (H)
    return tuple(map(HeadFindings, similarity.mean(-1).tolist(), ranks.tolist()))


def _energies(module: nn.Module, unit: Unit, moments: UnitMoments) -> Tensor:
    every = moments.every
    if unit.linear:  # linear attention has no logits
        return falling_eigenvalues(every[0].energy)
    if unit.kind == "qk":
        return logit_energies(every[0].energy, every[1].energy)
    per_head = _per_head(unit, every[0])
    # If a bias can absorb the mean of the channels, only their variation counts.
    second = per_head.covariance if unit.constants_pass else per_head.energy
    return output_energies(second, effective_output_weights(module, unit).view(-1, unit.heads, unit.width))


def _per_head(unit: Unit, moments: Moments) -> Moments:
    # Heads are cut separately, so products of channels of different heads are not needed.
    blocks = moments.second.view(unit.heads, unit.width, unit.heads, unit.width)
    second = torch.stack([blocks[head, :, head] for head in range(unit.heads)])  # (H, d, d)
    return Moments(moments.rows, moments.total.view(unit.heads, unit.width), second)


BY_WEIGHTS = "weights alone, inputs assumed uncorrelated (white)"
"""Value of ``judged_by`` for an inspection without images."""


@dataclass(frozen=True)
class UnitReport:
    """Description of the q/k or v channels of an attention layer, or of the hidden channels of an MLP."""

    kind: UnitKind
    head_count: int
    """Number of heads with their own channels: 1 for ``hidden``, fewer than in the layer if heads share
    channels."""
    now: int
    """Current number of channels per head, or of hidden channels of the MLP."""
    dense: int
    basis: Basis
    kept: tuple[tuple[int, ...], ...] | None
    """Indices of the kept channels of each head in the dense model; None if nothing was cut."""
    heads: tuple[HeadFindings, ...]
    """Similarity and rank of each head. Empty for hidden channels and if only tensor shapes were read. Also
    empty without images if the layer's inputs cannot be modelled as white noise."""


@dataclass(frozen=True)
class LayerReport:
    name: str
    """Module name in the model: ``blocks.0.attn``."""
    module: str
    family: LayerFamily
    heads: int | None
    """Number of attention heads; None for an MLP, or if the number is unknown."""
    units: Mapping[UnitKind, UnitReport]
    not_prunable: Mapping[UnitKind, str]
    coupled_with: Mapping[UnitKind, UnitKind]
    """Kind of channels, mapped to the kind whose channels are cut at the same time."""
    flops: int
    share: float
    parameters: int
    parameter_share: float


@dataclass(frozen=True)
class Inspection:
    source: str
    architecture: str
    input_size: tuple[int, int, int]
    """Image size [C, H, W] for which FLOPs are counted."""
    classes: int
    """Number of classes; 0 for a model without a classifier."""
    flops: int
    flops_by_side: Mapping[int, int]
    """FLOPs at half, equal and double image height, by height. Empty if the model takes 1 image size only."""
    parameters: int
    dtypes: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    not_prunable: tuple[str, ...]
    """Lines of text that name modules that are not prunable, 1 line for each reason."""
    preprocessing: Preprocessing
    provenance: Provenance
    history: tuple[Mapping[str, Any], ...]
    """Commands that made a slim file, oldest first, as the file states them (untrusted). Empty for a dense
    file."""
    slim: bool
    """Whether mhacut wrote the file after a cut."""
    tokens: TokenPlan
    """Plan of the tokens that the model merges or leaves out."""
    judged_by: str | None
    """Source of the findings about heads: a description of the images, or :data:`BY_WEIGHTS`; None if only
    shapes were read."""


def inspect_model(
    opened: Checkpoint,
    *,
    shapes_only: bool = False,
    evidence: tuple[Calibration, str] | None = None,
    preprocessing: PreprocessingOptions | None = None,
    prunable: PrunableLayers | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    model, record = opened.skeleton, opened.record
    prunable = prunable or find_prunable_layers(model)
    resolved = resolve_preprocessing(opened, preprocessing or PreprocessingOptions())
    flops = measure_flops_by_module(model if opened.has_weights else weightless(model), resolved.input_size)
    parameters = count_parameters(model)
    plans = {} if record is None else {unit.key: unit for unit in record.plan}
    if not shapes_only:
        model = opened.model  # the same module, with its weights; without them FLOPs are counted faster
    layers = []
    for done, layer in enumerate(prunable.layers, start=1):
        findings: dict[UnitKey, tuple[HeadFindings, ...]] = {}
        if layer.adapter.family == "attention" and not shapes_only:
            findings = _findings(model.get_submodule(layer.name), layer, evidence and evidence[0])
        units = {u.kind: _unit_report(u, plans.get(u.key), findings.get(u.key, ())) for u in layer.units}
        module, attends = model.get_submodule(layer.name), layer.adapter.family == "attention"
        own_flops, own_parameters = flops.get(layer.name, 0), count_parameters(module)
        layers.append(
            LayerReport(
                name=layer.name,
                module=type(module).__name__,
                family=layer.adapter.family,
                heads=_heads(layer, module) if attends else None,
                units=units,
                not_prunable=dict(layer.not_prunable),
                coupled_with=dict(layer.coupled_with),
                flops=own_flops,
                share=own_flops / flops[""],
                parameters=own_parameters,
                parameter_share=own_parameters / parameters,
            )
        )
        if progress is not None:
            progress(done, len(prunable.layers))
    judged_by = BY_WEIGHTS if evidence is None else evidence[1]
    return Inspection(
        source=opened.source,
        architecture=opened.identity.architecture,
        input_size=resolved.input_size,
        classes=classifier_size(model),
        flops=flops[""],
        flops_by_side=_flops_by_side(opened.skeleton, resolved.input_size, flops[""]),
        parameters=parameters,
        dtypes=tuple(
            sorted({dtype_name(dtype) for dtype in opened.dtypes.values() if dtype.is_floating_point})
        ),
        layers=tuple(layers),
        not_prunable=prunable.not_prunable,
        preprocessing=resolved,
        provenance=provenance(opened, preprocessing or PreprocessingOptions()),
        history=() if record is None else record.history,
        slim=record is not None,
        tokens=tokens_of(model),
        judged_by=None if shapes_only else judged_by,
    )


def _flops_by_side(model: nn.Module, size: tuple[int, int, int], own: int) -> Mapping[int, int]:
    channels, height, width = size
    counted, outline = {height: own}, weightless(model)
    for numerator, divisor in ((1, 2), (2, 1)):
        side = height * numerator // divisor
        # The model does not take this size: timm asserts, transformers raises ValueError, layers the others.
        with suppress(AssertionError, IndexError, RuntimeError, ValueError):
            counted[side] = measure_flops(outline, (channels, side, width * numerator // divisor))
    return dict(sorted(counted.items())) if len(counted) > 1 else {}


@torch.no_grad()
def _findings(
    module: nn.Module, layer: Layer, calibration: Calibration | None
) -> dict[UnitKey, tuple[HeadFindings, ...]]:
    findings = {}
    for unit in layer.units:
        if unit.kind == "hidden":  # the MLP of a block that holds attention too
            continue
        if calibration is None:
            by_weights = white_moments(module, unit)
            if by_weights is None:
                continue
            moments, similarity = by_weights
        else:
            moments = calibration.moments[unit.key]
            similarity = calibration.statistics[unit.key].redundancy
        findings[unit.key] = describe_heads(module, unit, moments, similarity)
    return findings


def _unit_report(unit: Unit, plan: UnitPlan | None, findings: tuple[HeadFindings, ...]) -> UnitReport:
    if plan is None or plan.keeps_all:
        return UnitReport(unit.kind, unit.heads, unit.width, unit.width, "channel", None, findings)
    return UnitReport(unit.kind, unit.heads, unit.width, plan.dense_width, plan.basis, plan.kept, findings)


def _heads(layer: Layer, module: nn.Module) -> int | None:
    if layer.units:
        return max(unit.heads for unit in layer.units)
    heads = getattr(module, "num_heads", None)
    return heads if isinstance(heads, int) else None


# --- in one line ---


def summary(inspection: Inspection) -> str:
    """Return a line with attention's share of the FLOPs, the kept channels, and their redundancy."""
    spent = sum(layer.share for layer in inspection.layers if layer.heads is not None)
    parts = [f"attention {100 * spent:.0f} % of {format_flops(inspection.flops)}"]
    kept, useful = [], []
    for kind in UNIT_KINDS:
        units = [layer.units[kind] for layer in inspection.layers if kind in layer.units]
        if units:
            share = sum(unit.now for unit in units) / sum(unit.dense for unit in units)
            kept.append(f"{100 * share:.0f} % of {kind}")
        if described := sum(unit.now * len(unit.heads) for unit in units):
            share = sum(head.rank99 for unit in units for head in unit.heads) / described
            useful.append(f"{100 * share:.0f} % of {kind}")
    if inspection.slim:
        parts.append("kept " + ", ".join(kept))
    parts += about_tokens(inspection.tokens)
    if useful:
        by = " (by weights alone)" if inspection.judged_by == BY_WEIGHTS else ""
        parts.append(f"99 % of the energy is in {', '.join(useful)}{by}")
    return "; ".join(parts)


def about_tokens(tokens: TokenPlan) -> list[str]:
    parts = []
    if tokens.merged:
        parts.append(f"tokens merged per block: {', '.join(map(str, tokens.merged))}")
    if tokens.output_tokens is not None:
        count = "token" if tokens.output_tokens == 1 else f"{tokens.output_tokens} tokens"
        parts.append(f"the last block computes only the {count} that the classifier reads")
    return parts


def about_sizes(inspection: Inspection) -> list[str]:
    """Return a line with the FLOPs of each image height, if the model takes several sizes."""
    counts = [f"{side}: {format_flops(flops)}" for side, flops in inspection.flops_by_side.items()]
    return [f"FLOPs by image height: {', '.join(counts)}"] if counts else []
