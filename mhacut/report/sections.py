"""Texts, charts and tables of a report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from mhacut.budget import format_flops
from mhacut.inspection.compare import Comparison
from mhacut.inspection.layers import HeadFindings, Inspection, LayerReport, UnitReport
from mhacut.plan import UNIT_KINDS, UnitKind
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

_NAMES: Mapping[str, str] = {"qk": "q/k", "v": "v", "hidden": "MLP"}
_ATTENTION_KINDS: tuple[UnitKind, ...] = ("qk", "v")
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
    figures: tuple[tuple[str, str, str], ...] = ()
    """Measurements of a run: name, dense value, slim value."""
    choices: tuple[Choice, ...] = ()
    """Models of a run with several budgets, the dense model first."""
    pictures: tuple[str, ...] = ()
    """Figures of merged tokens."""
    verdict: tuple[str, ...] = ()
    """Result of a run in a few lines, and advice. Warnings start with "warning: "."""


@dataclass(frozen=True)
class Table:
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    links: Sequence[str] = ()
    """Relative address of a page for each row, or ""."""


@dataclass(frozen=True)
class Section:
    title: str
    text: str = ""
    legend: Mapping[str, str] = field(default_factory=dict)
    """Meaning of each colour."""
    charts: Sequence[str] = ()
    """Figures as trusted HTML."""
    table: Table | None = None


def sections(contents: Contents) -> list[Section]:
    layers = _layers(contents.layers) if contents.comparison is None else _compared(contents.comparison)
    made = (
        _choices(contents.choices),
        _blocks(contents),
        _pictures(contents.pictures),
        _numbers(contents),
        layers,
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
    headings, *rows = choice_rows(choices, "divergence")
    text = "All models share one calibration. Point at a dot to see its numbers."
    text += f" Divergences are measured on {choices[-1].judged_on}."
    # As bytes, because file names may not be UTF-8.
    links = [quote(os.fsencode(choice.page)) for choice in choices]
    table = Table(headings, rows, links)
    return Section("Budgets", text, charts=choice_charts(choices), table=table)


def _numbers(contents: Contents) -> Section:
    inspection, comparison = contents.inspection, contents.comparison
    rows = [list(row) for row in contents.figures]
    if comparison is not None:
        rows.append(["FLOPs", *map(format_flops, comparison.flops)])
        rows.append(["parameters", *map(format_flops, comparison.parameters)])
        if comparison.agreement is None:
            answer = f"squared error of the features over their variance {comparison.divergence:.2g}"
        else:
            answer = (
                f"same top-1 class for {100 * comparison.agreement:.1f} % of the images, "
                f"KL divergence {comparison.divergence:.2g} nats"
            )
        text = f"Comparison with {comparison.dense} on {comparison.data}: {answer}."
        return Section("In numbers", text, table=Table(["", "dense", "slim"], rows))
    if rows:
        return Section("In numbers", table=Table(["", "dense", "slim"], rows))
    rows = [["FLOPs", format_flops(inspection.flops)], ["parameters", format_flops(inspection.parameters)]]
    return Section("In numbers", table=Table(["", ""], rows))


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


def _compared(comparison: Comparison) -> Section:
    layers = comparison.layers
    rows = [
        [
            layer.name,
            str(layer.tokens),
            ", ".join(f"{_NAMES[kind]} {dense} to {slim}" for kind, (dense, slim) in layer.widths.items()),
            *map(format_flops, layer.flops),
            f"{layer.own_error:.4f}",
            f"{layer.error:.4f}",
            f"{layer.agreement:.5f}",
        ]
        for layer in layers
    ]
    headings = ["layer", "tokens", "widths", "dense FLOPs", "slim FLOPs", "own error", "error", "agreement"]
    return Section(
        "Layers",
        "Error: relative error of the layer's output in the pruned model. Own error: the layer receives the "
        "dense model's input instead. Agreement: mean cosine similarity of a token's outputs in both models.",
        table=Table(headings, rows),
    )


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


def _layers(layers: Sequence[LayerReport]) -> Section:
    figures = ("similarity q/k, v", "rank 99 % q/k, v", "FLOPs", "parameters")
    rows = [
        [
            layer.name,
            "" if layer.heads is None else str(layer.heads),
            *(_width(layer.units.get(kind)) for kind in UNIT_KINDS),
            ", ".join(_means(layer, lambda head: head.similarity, ".3f")),
            ", ".join(_means(layer, lambda head: head.rank99, ".1f")),
            f"{100 * layer.share:.1f} %",
            f"{100 * layer.parameter_share:.1f} %",
        ]
        for layer in layers
    ]
    return Section(
        "Layers",
        "Widths: channels per head, left and dense. Similarity: mean similarity of a channel to the other "
        "channels of its head. Rank: number of principal channels that hold 99 % of the energy. Means over "
        "heads.",
        table=Table(["layer", "heads", *(_NAMES[kind] for kind in UNIT_KINDS), *figures], rows),
    )


def _width(unit: UnitReport | None) -> str:
    if unit is None:
        return ""
    return str(unit.now) if unit.now == unit.dense else f"{unit.now} of {unit.dense}"


def _means(layer: LayerReport, figure: Callable[[HeadFindings], float], digits: str) -> list[str]:
    """Return the mean of a figure over the heads of q/k, and over the heads of v."""
    units = [layer.units[kind] for kind in _ATTENTION_KINDS if kind in layer.units]
    return [format(sum(map(figure, unit.heads)) / len(unit.heads), digits) for unit in units if unit.heads]
