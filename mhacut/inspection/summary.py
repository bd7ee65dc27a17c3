"""Summary of an inspection in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mhacut.budget import format_flops
from mhacut.inspection.layers import BY_WEIGHTS, Inspection, LayerReport
from mhacut.plan import UNIT_KINDS, TokenPlan, UnitKind

LEAST = 0.2
"""Smallest share of redundant channels of a layer that is mentioned."""
_FRACTIONS = (
    (0.28, "a quarter"),
    (0.42, "a third"),
    (0.58, "half"),
    (0.71, "two thirds"),
    (0.83, "three quarters"),
)
_NUMBERED = re.compile(r"(?P<before>.*?)\.?(?P<number>\d+)(?P<after>\.\D*)?")


def summary(inspection: Inspection) -> str:
    """Return how much the model spends on attention, how much of it was kept, and where it is redundant.

    ``attention 36 % of 4.61G; about half of qk in blocks 7-11 is redundant``
    """
    attention = [layer for layer in inspection.layers if layer.heads is not None]
    spent = sum(layer.share for layer in attention)
    parts = [f"attention {100 * spent:.0f} % of {format_flops(inspection.flops)}"]
    if inspection.slim:
        parts.append(_kept(inspection))
    parts += _tokens(inspection.tokens)
    if inspection.judged_by is not None:
        by = " (by weights alone)" if inspection.judged_by == BY_WEIGHTS else ""
        parts.append(_redundant(attention) + by)
    return "; ".join(parts)


def _tokens(tokens: TokenPlan) -> list[str]:
    """Describe the tokens that are merged or left out."""
    parts = []
    if tokens.merged:
        parts.append(f"tokens merged per block: {', '.join(map(str, tokens.merged))}")
    if tokens.read is not None:
        shown = "token" if tokens.read == 1 else f"{tokens.read} tokens"
        parts.append(f"the last block computes only the {shown} that the classifier reads")
    return parts


def redundant_share(layer: LayerReport, kind: UnitKind) -> float | None:
    """Share of channels, in 0..1, that 99 % of the energy does not need: 1 - rank / width, a mean over heads.

    None if it is not known.
    """
    unit = layer.units.get(kind)
    if unit is None or not unit.heads:
        return None
    return 1 - sum(head.rank99 for head in unit.heads) / (len(unit.heads) * unit.now)


def kept_share(inspection: Inspection, kind: UnitKind) -> float | None:
    """Share of the dense model's channels of one kind that are left, in 0..1; None if it has none of them."""
    units = [layer.units[kind] for layer in inspection.layers if kind in layer.units]
    dense = sum(unit.dense for unit in units)
    return sum(unit.now for unit in units) / dense if dense else None


def _kept(inspection: Inspection) -> str:
    shares = {kind: kept_share(inspection, kind) for kind in UNIT_KINDS}
    parts = [f"{100 * share:.0f} % of {kind}" for kind, share in shares.items() if share is not None]
    return "kept " + ", ".join(parts)


def _redundant(attention: Sequence[LayerReport]) -> str:
    runs = {}
    for kind in ("qk", "v"):
        run = _longest(attention, {layer.name: redundant_share(layer, kind) or 0.0 for layer in attention})
        if run:
            runs[kind] = run
    if not runs:
        return "neither qk nor v is clearly redundant anywhere"
    kind, (layers, share) = max(runs.items(), key=lambda item: item[1][1] * len(item[1][0]))
    fraction = next((word for limit, word in _FRACTIONS if share < limit), "most")
    about = fraction if fraction == "most" else f"about {fraction}"
    return f"{about} of {kind} in {_place(layers, attention)} is redundant"


def _longest(
    attention: Sequence[LayerReport], shares: Mapping[str, float]
) -> tuple[Sequence[LayerReport], float] | None:
    """Return the run of neighbouring redundant layers with most redundant channels, and its mean share."""
    best: tuple[Sequence[LayerReport], float] | None = None
    start = 0
    for stop in range(1, len(attention) + 1):
        if stop < len(attention) and _alike(shares, attention[start], attention[stop]):
            continue
        run = attention[start:stop]
        mean = sum(shares[layer.name] for layer in run) / len(run)
        if shares[run[0].name] >= LEAST and (best is None or mean * len(run) > best[1] * len(best[0])):
            best = run, mean
        start = stop
    return best


def _alike(shares: Mapping[str, float], one: LayerReport, other: LayerReport) -> bool:
    return (shares[one.name] >= LEAST) == (shares[other.name] >= LEAST)


def _place(layers: Sequence[LayerReport], attention: Sequence[LayerReport]) -> str:
    """Name of a run of layers, ``blocks 7-11``."""
    if len(layers) == len(attention):
        return "all layers" if len(layers) > 1 else layers[0].name
    if len(layers) == 1:
        return layers[0].name
    first, last = (_NUMBERED.fullmatch(layer.name) for layer in (layers[0], layers[-1]))
    if first and last and (first["before"], first["after"]) == (last["before"], last["after"]):
        return f"{first['before']} {first['number']}-{last['number']}"
    return f"{layers[0].name} to {layers[-1].name}"
