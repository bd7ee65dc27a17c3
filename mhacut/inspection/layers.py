"""Layers and heads of a checkpoint: widths, costs, and the redundancy of their channels before a cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from mhacut.surgery.flops import count_parameters, measure_flops_by_module, weightless
from mhacut.surgery.tokens import tokens_of
from mhacut.text import dtype_name


@dataclass(frozen=True)
class HeadFindings:
    similarity: float
    """Mean absolute similarity of a channel to the others of the head, in 0..1; 0 if none are similar."""
    rank99: int
    """Number of principal channels with 99 % of the energy of the logits (qk) or of the head's output (v)."""


def describe_heads(
    module: nn.Module, unit: Unit, moments: UnitMoments, similarity: Tensor
) -> tuple[HeadFindings, ...]:
    """Describe each head of ``unit``; ``similarity`` [H, d] is that of a channel to others of its head."""
    ranks = effective_rank(_energies(module, unit, moments), 0.99)  # (H)
    return tuple(map(HeadFindings, similarity.mean(-1).tolist(), ranks.tolist()))


def _energies(module: nn.Module, unit: Unit, moments: UnitMoments) -> Tensor:
    """Energies of the principal channels of each head, descending, [H, d]."""
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
    """Moments of each head, [H, d, d], from the moments of all channels, [H * d, H * d]."""
    # Heads are cut separately, so products of channels of different heads are not needed.
    blocks = moments.second.view(unit.heads, unit.width, unit.heads, unit.width)
    second = torch.stack([blocks[head, :, head] for head in range(unit.heads)])  # (H, d, d)
    return Moments(moments.rows, moments.total.view(unit.heads, unit.width), second)


BY_WEIGHTS = "weights alone, inputs assumed uncorrelated (white)"
"""``judged_by`` of an inspection without images."""


@dataclass(frozen=True)
class UnitReport:
    """Description of the q/k or v channels of one attention layer, or of the hidden channels of one MLP."""

    kind: UnitKind
    head_count: int
    """Number of heads: 1 for ``hidden``; fewer than in the layer if heads share channels."""
    now: int
    """Channels per head, or of the whole MLP."""
    dense: int
    basis: Basis
    kept: tuple[tuple[int, ...], ...] | None
    """Indices of the dense channels that each head keeps; None if nothing was cut."""
    heads: tuple[HeadFindings, ...]
    """Findings about each head. Empty for hidden channels, if only shapes were read, and without images if
    inputs cannot be assumed white."""


@dataclass(frozen=True)
class LayerReport:
    name: str
    """Module name, ``blocks.0.attn``."""
    module: str
    family: LayerFamily
    heads: int | None
    """Number of heads; None for an MLP, or if the number is unknown."""
    units: Mapping[UnitKind, UnitReport]
    not_prunable: Mapping[UnitKind, str]
    coupled_with: Mapping[UnitKind, UnitKind]
    """Kinds whose channels are tied to those of another kind."""
    flops: int
    share: float
    parameters: int
    parameter_share: float


@dataclass(frozen=True)
class Inspection:
    source: str
    architecture: str
    input_size: tuple[int, int, int]
    """[C, H, W] of the images that FLOPs are counted for."""
    classes: int
    """Number of classes; 0 for a model that gives features."""
    flops: int
    parameters: int
    dtypes: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    not_prunable: tuple[str, ...]
    """Lines that name what is not prunable, one for each reason."""
    preprocessing: Preprocessing
    provenance: Provenance
    history: tuple[Mapping[str, Any], ...]
    """A slim file's record of the commands that made it, oldest first; untrusted. Empty for a dense file."""
    slim: bool
    """Whether the file was cut by mhacut."""
    tokens: TokenPlan
    """Tokens that the model merges or leaves out."""
    judged_by: str | None
    """Basis of the findings about heads: a description of images, or :data:`BY_WEIGHTS`; None if only shapes
    were read."""


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
    """Number of heads; None where no unit can be cut and the module has no ``num_heads``."""
    if layer.units:
        return max(unit.heads for unit in layer.units)
    heads = getattr(module, "num_heads", None)
    return heads if isinstance(heads, int) else None


# --- in one line ---


def summary(inspection: Inspection) -> str:
    """Return the share of attention in FLOPs, the kept channels, and their redundancy, in 1 line."""
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
