"""Texts, charts and tables of a report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from mhacut.budget import format_flops
from mhacut.inspection.compare import Comparison
from mhacut.inspection.layers import Inspection, LayerReport, UnitReport
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

_NAMES: Mapping[str, str] = {"qk": "q/k", "v": "v", "hidden": "MLP"}
_DIVERGENCE: Mapping[OutputMetric | None, tuple[str, str]] = {
    "answers": ("KL divergence, nats", "KL divergence from"),
    "features": ("squared error over variance", "relative squared error of the features, compared with"),
    "dense": ("divergence, nats per token", "divergence of the features of all tokens from"),
    None: ("divergence", "divergence from"),
}
"""Name of the axis of the sensitivity curves, and the words before "the dense model" in their text."""


@dataclass(frozen=True)
class Contents:
    """Content of a report."""

    inspection: Inspection
    layers: tuple[LayerReport, ...]
    """Layers to show, in this order."""
    comparison: Comparison | None = None
    sensitivity: StoredCurves = field(default_factory=StoredCurves)
    figures: tuple[tuple[str, ...], ...] = ()
    """Measurements of a run: name, dense value, slim value."""
    choices: tuple[Choice, ...] = ()
    """Models of a run with several budgets, the dense model first."""
    pictures: tuple[str, ...] = ()
    """Figures of merged tokens."""
    verdict: tuple[str, ...] = ()
    """Result of a run in a few lines, and advice. Warnings start with "warning: "."""


@dataclass(frozen=True)
class Section:
    title: str
    text: str = ""
    legend: Mapping[str, str] = field(default_factory=dict)
    """Meaning of each colour."""
    charts: Sequence[str] = ()
    """Figures as trusted HTML."""
    table: Sequence[Sequence[str]] = ()
    """Rows, the first with the headings."""
    links: Sequence[str] = ()
    """Relative address of a page for each row, or ""."""


def sections(contents: Contents) -> list[Section]:
    made = (
        _choices(contents.choices),
        _blocks(contents),
        _pictures(contents.pictures),
        _numbers(contents),
        _layers(contents),
        _curves(contents),
    )
    return [section for section in made if section is not None]


def headline(contents: Contents) -> list[tuple[str, str]]:
    """Return the main results of a run as (number, meaning)."""
    comparison = contents.comparison
    if comparison is None:
        return []
    results, (dense, slim) = [], comparison.flops
    for name, before, after in contents.figures:
        if name.startswith("top-1"):
            results.append((f"{after} %", f"{name.replace(', %', '')} (dense {before} %)"))
        elif name.startswith("latency"):
            times = float(before) / max(float(after), 1e-9)
            results.append((f"{times:.2f}x", f"faster: {before} to {after} ms ({name.partition('(')[2]}"))
        elif name == "file":
            results.append((after, f"file size (dense {before})"))
    if (
        not any(name.startswith("top-1") for name, *_ in contents.figures)
        and comparison.agreement is not None
    ):
        same = f"same class as the dense model, {comparison.data}"
        results.insert(0, (f"{100 * comparison.agreement:.1f} %", same))
    results.append(
        (f"{100 * slim / dense:.1f} %", f"of the FLOPs: {format_flops(dense)} to {format_flops(slim)}")
    )
    return results


def _choices(choices: Sequence[Choice]) -> Section | None:
    if not choices:
        return None
    text = "All models share one calibration. Point at a dot to see its numbers."
    text += f" Divergences are measured on {choices[-1].judged_on}."
    # As bytes, because file names may not be UTF-8.
    links = [quote(os.fsencode(choice.page)) for choice in choices]
    table = choice_rows(choices, "divergence")
    return Section("Budgets", text, charts=choice_charts(choices), table=table, links=links)


def _numbers(contents: Contents) -> Section:
    inspection, comparison = contents.inspection, contents.comparison
    if comparison is None:
        costs = [
            ["FLOPs", format_flops(inspection.flops)],
            ["parameters", format_flops(inspection.parameters)],
        ]
        return Section("In numbers", table=[["", "model"], *costs])
    rows = [["", "dense", "slim"], *map(list, contents.figures)]
    rows.append(["FLOPs", *map(format_flops, comparison.flops)])
    rows.append(["parameters", *map(format_flops, comparison.parameters)])
    text = f"Comparison with {comparison.dense} on {comparison.data}: {comparison.outputs()}."
    return Section("In numbers", text, table=rows)


def _blocks(contents: Contents) -> Section | None:
    """Tokens and widths that each block keeps. For a dense model: widths that hold 99 % of the energy."""
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
