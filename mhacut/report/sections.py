"""Texts, charts and tables of a report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from mhacut.budget import format_flops
from mhacut.inspection.compare import Comparison
from mhacut.inspection.layers import Inspection, LayerReport, UnitReport
from mhacut.measuring.accuracy import Figure
from mhacut.pruning.preserve import OutputMetric
from mhacut.report.charts import (
    DEPTHS,
    Line,
    Share,
    depth_colour,
    line_chart,
    share_table,
)
from mhacut.report.choices import Choice, choice_charts, choice_rows
from mhacut.report.history import StoredCurves
from mhacut.report.tables import COMPARISON_NOTES, LAYER_NOTES, comparison_rows, layer_rows
from mhacut.text import filled_columns

_NAMES: Mapping[str, str] = {"qk": "q/k", "v": "v", "hidden": "MLP"}
_DIVERGENCE: Mapping[OutputMetric | None, tuple[str, str]] = {
    "answers": ("KL divergence, nats", "KL divergence from"),
    "features": ("squared error over variance", "relative squared error of the features, compared with"),
    "dense": ("divergence, nats per token", "divergence of the features of all tokens from"),
    None: ("divergence", "divergence from"),
}
"""Label of the chart axis, and words in the chart's text, by the metric of the divergence."""


@dataclass(frozen=True)
class Contents:
    inspection: Inspection
    layers: tuple[LayerReport, ...]
    """Layers in the order in which the report shows them."""
    comparison: Comparison | None = None
    sensitivity: StoredCurves = field(default_factory=StoredCurves)
    figures: Sequence[Figure] = ()
    """Measured values of a pruning run, such as FLOPs and top-1 accuracy."""
    choices: Sequence[Choice] = ()
    """Pruned models of a run with several budgets."""
    pictures: tuple[str, ...] = ()
    """Pictures of merged tokens, as HTML."""
    verdict: tuple[str, ...] = ()
    """Result of a run in a few lines, with advice. Lines of warnings start with "warning: "."""


@dataclass(frozen=True)
class Section:
    title: str
    text: str = ""
    legend: Mapping[str, str] = field(default_factory=dict)
    """Meaning of each colour in the charts, by colour."""
    charts: Sequence[str] = ()
    """Charts and pictures as HTML, which is not escaped."""
    table: Sequence[Sequence[str]] = ()
    """Rows of cells. Row 0 has the headings."""
    links: Sequence[str] = ()
    """Address of a page for each row below the headings, or an empty text."""


def sections(contents: Contents) -> list[Section]:
    made = (
        _choices(contents.choices),
        _numbers(contents),
        _blocks(contents),
        _pictures(contents.pictures),
        _layers(contents),
        _curves(contents),
    )
    return [section for section in made if section is not None]


def _choices(choices: Sequence[Choice]) -> Section | None:
    if not choices:
        return None
    text = "All models share one calibration. Point at a dot to see its numbers."
    text += f" Divergences are measured on {choices[-1].figures[-1].conditions.strip('()')}."
    # As bytes, because file names may not be UTF-8.
    links = ["", *(quote(os.fsencode(choice.page)) for choice in choices)]
    return Section("Budgets", text, charts=choice_charts(choices), table=choice_rows(choices), links=links)


def _numbers(contents: Contents) -> Section:
    inspection, comparison, figures = contents.inspection, contents.comparison, contents.figures
    text = "" if comparison is None else f"Comparison with {comparison.dense}"
    if not figures:  # inspect, with or without a dense model
        flops, parameters = inspection.flops, inspection.parameters
        figures = [Figure("FLOPs", None, flops, ""), Figure("parameters", None, parameters, "")]
    if not contents.figures and comparison is not None:
        pairs = {"FLOPs": comparison.flops, "parameters": comparison.parameters}
        figures = [Figure(name, dense, slim, "") for name, (dense, slim) in pairs.items()]
        text += f" on {comparison.data}: {comparison.outputs()}"
    rows = [["", "dense", "slim" if comparison else "model", "ratio"], *(figure.row() for figure in figures)]
    return Section("In numbers", text and f"{text}.", table=filled_columns(rows))


def _blocks(contents: Contents) -> Section | None:
    slim, comparison = contents.inspection.slim, contents.comparison
    merges = any(contents.inspection.tokens.merged)
    tokens = {layer.name: layer.tokens for layer in comparison.layers} if comparison and merges else {}
    most = max(tokens.values(), default=0)
    rows: dict[str, dict[str, Share]] = {}
    for layer in contents.layers:
        row = rows.setdefault(layer.name.rpartition(".")[0] or layer.name, {})
        if layer.family == "attention" and most:
            count = tokens.get(layer.name, most)
            row["tokens"] = Share(count / most, str(count), f"{layer.name}: {count} of {most} tokens")
        for kind, unit in layer.units.items():
            part, whole = (unit.now, unit.dense) if slim else (_needed(unit), unit.now)
            if part is not None and whole:
                tooltip = f"{layer.name}: {part} of {whole} channels"
                row[_NAMES[kind]] = Share(part / whole, f"{part:.0f}", tooltip)
    colours = {
        "tokens": DEPTHS[4],
        **dict(zip(_NAMES.values(), (DEPTHS[1], DEPTHS[0], DEPTHS[2]), strict=True)),
    }
    columns = {name: colour for name, colour in colours.items() if any(name in row for row in rows.values())}
    if not columns:
        return None
    title = "Tokens and channels left in each block" if merges else "Channels left in each block"
    text = "Channels per head (q/k, v) or per MLP. Point at a bar to see its numbers."
    if not slim:
        title = "Principal channels of a head that hold 99 % of the energy"
    return Section("Blocks", text, charts=[share_table(title, columns, list(rows.items()))])


def _pictures(pictures: Sequence[str]) -> Section | None:
    text = (
        "Calibration images after two of the blocks that merge tokens. All patches of one token have their "
        "mean colour. Above each image: predictions of the dense and of the pruned model."
    )
    return Section("Merged tokens", text, charts=pictures) if pictures else None


def _needed(unit: UnitReport) -> float | None:
    return sum(head.rank99 for head in unit.heads) / len(unit.heads) if unit.heads else None


def _curves(contents: Contents) -> Section | None:
    sensitivity = contents.sensitivity
    if not sensitivity.curves:
        return None
    axis, divergence = _DIVERGENCE[sensitivity.metric]
    charts = []
    for kind, name in _NAMES.items():
        curves = [curve for curve in sensitivity.curves if curve.kind == kind]
        # Curves are in the model's order, and colours show the depth.
        lines = []
        for number, curve in enumerate(curves):
            full = curve.points[-1][0]  # shares, because layers have different widths
            error = dict(curve.points).get(curve.chosen)
            marked = None if error is None else (curve.chosen / full, error)
            points = [(width / full, error) for width, error in curve.points]
            colour = depth_colour(number / max(len(curves) - 1, 1))
            lines.append(Line(curve.layer, points, colour, marked))
        title = f"{name}: error against width"
        # Logarithmic: errors span orders of magnitude. The error at full width, 0, is not drawn.
        charts.append(line_chart(title, lines, "share of width", axis, logarithmic=True))
    text = f"Estimated {divergence} the dense model if only one layer is cut to a width and corrected."
    if sensitivity.budget is not None:
        text += f" Dots: chosen widths for a budget of {format_flops(sensitivity.budget)} FLOPs."
    legend = {DEPTHS[0]: "first layers", DEPTHS[2]: "middle", DEPTHS[4]: "last layers"}
    return Section("Sensitivity", text, legend, [chart for chart in charts if chart])


def _layers(contents: Contents) -> Section:
    if contents.comparison is None:
        return Section("Layers", ". ".join(LAYER_NOTES) + ".", table=layer_rows(contents.layers))
    return Section(
        "Layers", ". ".join(COMPARISON_NOTES) + ".", table=comparison_rows(contents.comparison.layers)
    )
