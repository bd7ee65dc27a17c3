"""Rows of the table of all heads, which the page's script searches and sorts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mhacut.inspection.layers import LayerReport, UnitReport
from mhacut.text import ranges

HEADINGS = (
    ("layer", "Module name"),
    ("head", "Number of the head; MLPs have none"),
    ("kind", "q/k, v, or hidden channels"),
    ("width", "Channels now"),
    ("dense", "Channels before any cut"),
    ("similarity", "Mean similarity of a channel to the others of its head"),
    ("rank 90 %", "Principal channels that hold 90 % of the energy"),
    ("rank 99 %", "Principal channels that hold 99 % of the energy"),
    ("FLOPs %", "Share of the model's FLOPs that the whole head, or MLP, takes"),
    ("parameters %", "Share of the model's parameters that the whole head, or MLP, has"),
    ("channels", "Channels that were kept and removed, and those that a cut would keep"),
)
"""Name of each column and its explanation."""


@dataclass(frozen=True)
class HeadRow:
    """Row for one kind of channels of one head, or for one MLP."""

    layer: str
    cells: tuple[str, ...]
    """Columns between the first and the last of :data:`HEADINGS`."""
    channels: tuple[tuple[str, str], ...]
    """Last column: names of groups of channels, and the indices of each."""


def head_rows(layers: Sequence[LayerReport]) -> list[HeadRow]:
    """Return one row per head and kind, and one per MLP."""
    return [
        _row(layer, unit, head)
        for layer in layers
        for unit in layer.units.values()
        for head in range(unit.head_count)
    ]


def _row(layer: LayerReport, unit: UnitReport, head: int) -> HeadRow:
    findings = ("", "", "")
    if head < len(unit.heads):
        found = unit.heads[head]
        findings = (f"{found.similarity:.3f}", str(found.rank90), str(found.rank99))
    cells = (
        "" if layer.heads is None else str(head),
        unit.kind,
        str(unit.now),
        str(unit.dense),
        *findings,
        f"{100 * layer.share / unit.head_count:.2f}",
        f"{100 * layer.parameter_share / unit.head_count:.2f}",
    )
    return HeadRow(layer.name, cells, tuple(_channels(unit, head)))


def _channels(unit: UnitReport, head: int) -> list[tuple[str, str]]:
    listed = []
    if unit.kept is not None:
        kept = unit.kept[head]
        removed = sorted(set(range(unit.dense)) - set(kept))
        listed += [(f"kept ({unit.basis})", ranges(kept)), ("removed", ranges(removed))]
    if unit.heads:
        keeps = unit.heads[head].keeps
        listed += [(f"a cut to {share} % would keep", ranges(channels)) for share, channels in keeps.items()]
    return listed
