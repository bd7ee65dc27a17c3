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
    Line,
    Share,
    bar_chart,
    depth_colour,
    line_chart,
    share_table,
)
from mhacut.report.choices import Choice, choice_charts, choice_rows
from mhacut.report.history import StoredCurves

_NAMES: Mapping[str, str] = {"qk": "q/k", "v": "v", "hidden": "MLP"}
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
    pictures: tuple[str, ...] = ()
    """Figures of images whose tokens are merged."""
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
    layers = _layers(contents.layers) if contents.comparison is None else _compared(contents.comparison)
    made = (
        _choices(contents.choices),
        _flops(contents),
        _blocks(contents),
        _pictures(contents.pictures),
        _numbers(contents),
        layers,
        _curves(contents),
    )
    return [section for section in made if section is not None]


def headline(contents: Contents) -> list[tuple[str, str]]:
    """Return what a run comes down to: a few numbers, each with what it is."""
    comparison = contents.comparison
    if comparison is None:
        return []
    found, (dense, slim) = [], comparison.flops
    for name, before, after in contents.figures:
        if name.startswith("top-1"):
            found.append((f"{after} %", f"{name.replace(', %', '')}; dense {before} %"))
        elif name.startswith("latency"):
            times = float(before) / max(float(after), 1e-9)
            found.append((f"{times:.2f}x", f"as fast: {before} to {after} ms ({name.partition('(')[2]}"))
        elif name == "file":
            found.append((after, f"file; dense {before}"))
    if (
        not any(name.startswith("top-1") for name, *_ in contents.figures)
        and comparison.agreement is not None
    ):
        found.insert(0, (f"{100 * comparison.agreement:.1f} %", f"same answer as dense, {comparison.data}"))
    found.append(
        (f"{100 * slim / dense:.1f} %", f"of the FLOPs; {format_flops(dense)} to {format_flops(slim)}")
    )
    return found


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


def _flops(contents: Contents) -> Section:
    """FLOPs by kind of layer before and after, or without a dense model those of each layer."""
    comparison, inspection = contents.comparison, contents.inspection
    names = {"attention": "attention", "mlp": "MLP", "rest": "the rest"}
    bars = []
    if comparison is not None:
        for step, spent in comparison.spent.items():
            begin, whole = 0, sum(spent.values())
            for family, count in spent.items():
                bars.append(Bar(step, begin, begin + count, family, format_flops(whole)))
                begin += count
        legend = {COLOURS[name]: meaning for name, meaning in names.items()}
        return Section("FLOPs", legend=legend, charts=[bar_chart("Where the FLOPs went, step by step", bars)])
    so_far = inspection.flops - sum(layer.flops for layer in inspection.layers)
    # Patch embedding, norms, classifier: the bars of the layers begin where these end.
    bars.append(Bar("outside of these", 0, so_far, "rest", format_flops(so_far)))
    for layer in inspection.layers:
        description = f"{format_flops(layer.flops)} ({100 * layer.share:.0f} %)"
        bars.append(Bar(layer.name, so_far, so_far + layer.flops, layer.family, description))
        so_far += layer.flops
    bars.append(Bar("total", 0, so_far, "total", format_flops(so_far)))
    legend = {COLOURS[name]: meaning for name, meaning in {**names, "total": "the whole model"}.items()}
    return Section("FLOPs", legend=legend, charts=[bar_chart("FLOPs of each layer", bars)])


def _blocks(contents: Contents) -> Section | None:
    """Tokens and widths that each block keeps; of a dense model, widths that hold nearly all energy."""
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
                said = f"{layer.name}: {part} of {whole} channels"
                row[_NAMES[kind]] = Share(part / whole, f"{part:.0f}", said)
    colours = {
        "tokens": DEPTHS[4],
        **dict(zip(_NAMES.values(), (DEPTHS[1], DEPTHS[0], DEPTHS[2]), strict=True)),
    }
    columns = {name: colour for name, colour in colours.items() if any(name in row for row in rows.values())}
    if not columns:
        return None
    title = "Tokens and channels that each block keeps" if merges else "Channels that each block keeps"
    text = "Channels are those of a head, or of an MLP. Point at a bar to see its numbers."
    if not slim:
        title = "Channels of a head that hold 99 % of the energy"
    return Section("Blocks", text, charts=[share_table(title, columns, list(rows.items()))])


def _pictures(pictures: Sequence[str]) -> Section | None:
    text = (
        "Images that the model was calibrated on. Patches of one token, after the block that is named, have "
        "their mean colour, wherever they lie. Above: answers of the dense and of the pruned model."
    )
    return Section("Merged tokens", text, charts=pictures) if pictures else None


def _needed(unit: UnitReport) -> float | None:
    return sum(head.rank99 for head in unit.heads) / len(unit.heads) if unit.heads else None


def _compared(comparison: Comparison) -> Section:
    """Widths, FLOPs and errors of each layer, compared with the dense model."""
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
