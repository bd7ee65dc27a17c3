"""Tables of layers, for the terminal and for HTML pages."""

from __future__ import annotations

from collections.abc import Sequence

from mhacut.budget import format_flops
from mhacut.inspection.compare import LayerComparison
from mhacut.inspection.layers import HeadFindings, LayerReport
from mhacut.plan import UnitKind
from mhacut.text import filled_columns

LAYER_NOTES = (
    "qk, v, hidden: channels per head or per MLP, pruned/dense",
    "sim: mean similarity between channels of a head, from 0 (different) to 1 (equal)",
    "r99: principal channels with 99 % of the energy",
)
"""Explanations of the columns of :func:`layer_rows`."""
COMPARISON_NOTES = (
    "ratio: the layer's FLOPs in the pruned model divided by its FLOPs in the dense model",
    "error: relative error of the layer's output in the pruned model",
    "own error: the same, if the layer receives the dense model's input",
)
"""Explanations of the columns of :func:`comparison_rows`."""


def layer_rows(layers: Sequence[LayerReport], *, by_head: bool = False) -> list[list[str]]:
    """Return table rows: headings, and a row per layer. ``by_head`` adds a row per head below a layer."""
    rows = [["layer", "heads", "qk", "sim", "r99", "v", "sim", "r99", "hidden", "FLOPs", "params"]]
    for layer in layers:
        cells = [layer.name, "" if layer.heads is None else str(layer.heads)]
        for kind in ("qk", "v"):
            cells += [_width(layer, kind), *_findings(layer.units[kind].heads if kind in layer.units else ())]
        rows.append([*cells, _width(layer, "hidden"), percent(layer.share), percent(layer.parameter_share)])
        for head in range(layer.heads or 0) if by_head else ():
            rows.append(
                [f"  head {head}", "", *_head(layer, "qk", head), *_head(layer, "v", head), "", "", ""]
            )
    return filled_columns(rows)


def comparison_rows(layers: Sequence[LayerComparison]) -> list[list[str]]:
    rows = [["layer", "tokens", "widths", "FLOPs", "ratio", "own error", "error"]]
    for layer in layers:
        before, after = layer.flops
        rows.append(
            [
                layer.name,
                str(layer.tokens or ""),
                " ".join(f"{kind} {dense}>{slim}" for kind, (dense, slim) in layer.widths.items()),
                format_flops(after),
                percent(after / before) if before else "",
                f"{layer.own_error:.3f}",
                f"{layer.error:.3f}",
            ]
        )
    return filled_columns(rows)


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _head(layer: LayerReport, kind: UnitKind, head: int) -> list[str]:
    unit = layer.units.get(kind)
    if unit is None or head >= unit.head_count:  # heads may share the channels of one head
        return ["", "", ""]
    return [_width(layer, kind), *_findings(unit.heads[head : head + 1])]


def _findings(heads: Sequence[HeadFindings]) -> list[str]:
    if not heads:
        return ["", ""]
    similarity = sum(head.similarity for head in heads) / len(heads)
    rank = sum(head.rank99 for head in heads) / len(heads)
    return [f"{similarity:.2f}".removeprefix("0"), f"{rank:.0f}"]


def _width(layer: LayerReport, kind: UnitKind) -> str:
    if kind in layer.not_prunable:
        return "whole"
    if kind in layer.coupled_with:
        return f"as {layer.coupled_with[kind]}"
    if kind not in layer.units:
        return ""
    unit = layer.units[kind]
    return str(unit.now) if unit.now == unit.dense else f"{unit.now}/{unit.dense}"
