"""Sections of a report: their text, charts and tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from mhacut.budget import format_flops
from mhacut.inspection.compare import Comparison
from mhacut.inspection.layers import HeadFindings, Inspection, LayerReport, UnitReport
from mhacut.plan import UNIT_KINDS, UnitKind
from mhacut.pruning.preserve import Measure
from mhacut.report.charts import (
    COLOURS,
    DEPTHS,
    Bar,
    Cell,
    Line,
    depth_colour,
    heat_map,
    line_chart,
    waterfall,
)
from mhacut.report.choices import Choice, choice_charts, choice_rows
from mhacut.report.history import StoredCurves

_NAMES: Mapping[str, str] = {"qk": "q/k", "v": "v", "hidden": "MLP hidden"}
_ATTENTION_KINDS: tuple[UnitKind, ...] = ("qk", "v")
_DIVERGENCE: Mapping[Measure | None, tuple[str, str]] = {
    "answers": ("KL divergence, nats", "KL divergence from"),
    "features": ("squared error over variance", "error of the features, relative to those of"),
    "dense": ("divergence, nats per token", "divergence of all tokens' features from those of"),
    None: ("divergence", "divergence from"),
}
"""Name of a sensitivity curve's axis, and words before "the dense model"."""


@dataclass(frozen=True)
class Contents:
    """Everything that a report shows."""

    inspection: Inspection
    layers: tuple[LayerReport, ...]
    """Layers to show, in the order to show them."""
    comparison: Comparison | None = None
    sensitivity: StoredCurves = field(default_factory=StoredCurves)
    """Sensitivity curves of the last cut."""
    figures: tuple[tuple[str, str, str], ...] = ()
    """Measurements of a run: name, value before, value after."""
    choices: tuple[Choice, ...] = ()
    """Models of a run with several budgets, the dense one first."""
    verdict: tuple[str, ...] = ()
    """Lines on what a run kept and won, and on what its user can do; the first may be a warning."""


@dataclass(frozen=True)
class Table:
    """Headings and rows; the first column names the rows."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    links: Sequence[str] = ()
    """Relative address of the page about each row, "" for none; nothing if no row has one."""


@dataclass(frozen=True)
class Section:
    """One part of a report, under a heading."""

    title: str
    text: str = ""
    legend: Mapping[str, str] = field(default_factory=dict)
    """Meaning of each colour."""
    charts: Sequence[str] = ()
    """Figures, as HTML that is safe."""
    table: Table | None = None


def sections(contents: Contents) -> list[Section]:
    """Return the sections for which ``contents`` has something to show."""
    made = (
        _choices(contents.choices),
        _numbers(contents),
        _heads(contents),
        _flops(contents),
        _errors(contents.comparison),
        _curves(contents),
        _layers(contents.layers),
    )
    return [section for section in made if section is not None]


def _choices(choices: Sequence[Choice]) -> Section | None:
    """Compare the models of several budgets."""
    if not choices:
        return None
    headings, *rows = choice_rows(choices, "divergence")
    text = "Each budget has its own file; all share one calibration. Point at a dot to see its numbers."
    text += f" Divergences are of {choices[-1].judged_on}."
    # As bytes: names of files need not be UTF-8.
    links = [quote(os.fsencode(choice.page)) for choice in choices]
    table = Table(headings, rows, links)
    return Section("Budgets", text, charts=choice_charts(choices), table=table)


def _numbers(contents: Contents) -> Section:
    """Cost of the whole model, and measurements of the run."""
    inspection, comparison = contents.inspection, contents.comparison
    rows = [list(row) for row in contents.figures]
    if comparison is not None:
        rows.append(["FLOPs", *map(format_flops, comparison.flops)])
        rows.append(["parameters", *map(format_flops, comparison.parameters)])
        if comparison.agreement is None:
            answer = f"squared error of the features {comparison.divergence:.2g} of their variance"
        else:
            answer = (
                f"{100 * comparison.agreement:.1f} % of images have the same top-1 class, "
                f"KL divergence {comparison.divergence:.2g} nats"
            )
        text = f"Compared with {comparison.dense}, on {comparison.data}: {answer}."
        return Section("In numbers", text, table=Table(["", "dense", "slim"], rows))
    if rows:
        return Section("In numbers", table=Table(["", "before", "after"], rows))
    rows = [["FLOPs", format_flops(inspection.flops)], ["parameters", format_flops(inspection.parameters)]]
    return Section("In numbers", table=Table(["", ""], rows))


def _heads(contents: Contents) -> Section | None:
    """Heat maps, layers by heads: width kept, and redundancy."""
    attention = [layer for layer in contents.layers if layer.heads]
    if not attention:
        return None
    charts = [
        heat_map(f"{_NAMES[kind]}: share of width kept", _cells(attention, kind, _kept), 1.0)
        for kind in _ATTENTION_KINDS
    ]
    for kind in _ATTENTION_KINDS if contents.inspection.judged_by is not None else ():
        rows = _cells(attention, kind, _similarity)
        # Not below 0.01: shades of noise would look like redundancy.
        maximum = max([0.01, *(cell.value for _, cells in rows for cell in cells if cell is not None)])
        title = f"{_NAMES[kind]}: redundancy (mean channel similarity), 0 to {maximum:.2f}"
        charts.append(heat_map(title, rows, maximum))
    text = (
        "Rows are layers, columns are heads; the stronger the colour, the larger the value. "
        "Point at a cell to see its numbers."
    )
    return Section("Heads", text, charts=charts)


def _cells(
    layers: Sequence[LayerReport],
    kind: UnitKind,
    cell: Callable[[LayerReport, UnitReport, int], Cell | None],
) -> list[tuple[str, list[Cell | None]]]:
    """Rows of a heat map; None where a layer has no such head, or nothing of that kind."""
    rows = []
    for layer in layers:
        # Where channels of several heads are tied, the unit has fewer heads than the layer.
        unit, cells = layer.units.get(kind), []
        for head in range(layer.heads or 0):
            cells.append(None if unit is None or head >= unit.head_count else cell(layer, unit, head))
        rows.append((layer.name, cells))
    return rows


def _kept(layer: LayerReport, unit: UnitReport, head: int) -> Cell:
    share = unit.now / unit.dense
    return Cell(
        share, f"{layer.name}, head {head}: {unit.now} of {unit.dense} channels ({100 * share:.0f} %)"
    )


def _similarity(layer: LayerReport, unit: UnitReport, head: int) -> Cell | None:
    if head >= len(unit.heads):
        return None
    one = unit.heads[head]
    return Cell(
        one.similarity,
        f"{layer.name}, head {head}: similarity {one.similarity:.3f}; {one.rank90} and {one.rank99} of "
        f"{unit.now} principal channels hold 90 and 99 % of the energy",
    )


def _flops(contents: Contents) -> Section:
    """FLOPs of each layer, or, compared with a dense model, those that each layer saves."""
    meanings = {"attention": "attention", "mlp": "MLP", "total": "the whole model", "rest": "the rest"}
    legend = {COLOURS[name]: meaning for name, meaning in meanings.items()}
    if contents.comparison is not None:
        del legend[COLOURS["rest"]]
        return Section("FLOPs", legend=legend, charts=[_saved_flops(contents.comparison)])
    return Section("FLOPs", legend=legend, charts=[_spent_flops(contents.inspection)])


def _saved_flops(comparison: Comparison) -> str:
    dense, slim = comparison.flops
    bars = [Bar("dense", 0, dense, "total", format_flops(dense))]
    left = dense  # each bar begins where the one above it ends
    for layer in comparison.layers:
        saved = layer.flops[0] - layer.flops[1]
        bars.append(Bar(layer.name, left, left - saved, layer.family, f"-{format_flops(saved)}"))
        left -= saved
    bars.append(Bar("slim", 0, slim, "total", format_flops(slim)))
    return waterfall("FLOPs that each layer saves", bars)


def _spent_flops(inspection: Inspection) -> str:
    layers = inspection.layers
    so_far = inspection.flops - sum(layer.flops for layer in layers)
    # Patch embedding, norms, classifier: the bars of the layers begin where these end.
    bars = [Bar("outside these layers", 0, so_far, "rest", format_flops(so_far))]
    for layer in layers:
        description = f"{format_flops(layer.flops)} ({100 * layer.share:.1f} %)"
        bars.append(Bar(layer.name, so_far, so_far + layer.flops, layer.family, description))
        so_far += layer.flops
    bars.append(Bar("total", 0, so_far, "total", format_flops(so_far)))
    return waterfall("FLOPs of each layer", bars)


def _errors(comparison: Comparison | None) -> Section | None:
    """Error of each layer's output, compared with the dense model."""
    if comparison is None:
        return None
    layers = comparison.layers
    # What lies between the two is what errors of the layers before it do to this one.
    lines = [
        Line("own error", [(i, layer.own_error) for i, layer in enumerate(layers)], DEPTHS[0]),
        Line(
            "error inside the pruned model", [(i, layer.error) for i, layer in enumerate(layers)], DEPTHS[-1]
        ),
    ]
    rows = [
        [
            layer.name,
            ", ".join(f"{kind} {dense} to {slim}" for kind, (dense, slim) in layer.widths.items()),
            *map(format_flops, layer.flops),
            f"{layer.own_error:.4f}",
            f"{layer.error:.4f}",
            f"{layer.agreement:.5f}",
        ]
        for layer in layers
    ]
    headings = ["layer", "widths", "dense FLOPs", "slim FLOPs", "own error", "error", "agreement"]
    return Section(
        "Compared with the dense model",
        "Error: relative error of the layer's output inside the pruned model. Own error: the same, but with "
        "the dense model's input. Agreement: mean cosine similarity of the two outputs of a token.",
        legend={line.colour: line.label for line in lines},
        charts=[
            line_chart("Relative error of each layer's output", lines, "layer, in the model's order", "error")
        ],
        table=Table(headings, rows),
    )


def _curves(contents: Contents) -> Section | None:
    """Sensitivity curves, and the widths that were chosen."""
    sensitivity = contents.sensitivity
    if not sensitivity.curves:
        return None
    axis, divergence = _DIVERGENCE[sensitivity.measure]
    charts = []
    for kind, name in _NAMES.items():
        curves = [curve for curve in sensitivity.curves if curve.kind == kind]
        # Curves stand in the model's order, so that a colour is a depth whatever the number of layers.
        lines = []
        for number, curve in enumerate(curves):
            full = curve.points[-1][0]  # as shares, layers of different widths fit one axis
            error = dict(curve.points).get(curve.chosen)
            marked = None if error is None else (curve.chosen / full, error)
            points = [(width / full, error) for width, error in curve.points]
            colour = depth_colour(number / max(len(curves) - 1, 1))
            lines.append(Line(curve.layer, points, colour, marked))
        title = f"{name}: error against width"
        # Errors of one unit span orders of magnitude; at full width they are 0, which has no place there.
        charts.append(line_chart(title, lines, "share of width", axis, logarithmic=True))
    text = f"Estimated {divergence} the dense model if one unit alone is cut to a width and repaired."
    if sensitivity.budget is not None:
        text += f" Dots: widths that were chosen for a budget of {format_flops(sensitivity.budget)} FLOPs."
    legend = {DEPTHS[0]: "first layers", DEPTHS[2]: "middle", DEPTHS[4]: "last layers"}
    return Section("Sensitivity", text, legend, [chart for chart in charts if chart])


def _layers(layers: Sequence[LayerReport]) -> Section:
    """Widths, redundancy and cost of each layer; means over heads."""
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
        "Widths are channels per head, of those before the cut. Similarity: mean similarity of a channel to "
        "the others of its head. Rank: principal channels that hold 99 % of the energy.",
        table=Table(["layer", "heads", *(_NAMES[kind] for kind in UNIT_KINDS), *figures], rows),
    )


def _width(unit: UnitReport | None) -> str:
    if unit is None:
        return ""
    return str(unit.now) if unit.now == unit.dense else f"{unit.now} of {unit.dense}"


def _means(layer: LayerReport, figure: Callable[[HeadFindings], float], digits: str) -> list[str]:
    """Mean of a figure over the heads of q/k, and over those of v, where it is known."""
    units = [layer.units[kind] for kind in _ATTENTION_KINDS if kind in layer.units]
    return [format(sum(map(figure, unit.heads)) / len(unit.heads), digits) for unit in units if unit.heads]
