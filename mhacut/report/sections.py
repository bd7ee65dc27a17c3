"""The parts of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mhacut.budget import format_flops
from mhacut.inspection.layers import Inspection, LayerReport, UnitReport
from mhacut.plan import UnitKind
from mhacut.report.charts import Bar, Line, heat_map, legend, line_chart, waterfall
from mhacut.report.contents import Contents, StoredCurve
from mhacut.report.history import step
from mhacut.report.markup import Markup, tag

_NAMES: Mapping[str, str] = {"qk": "q/k", "v": "v", "hidden": "MLP hidden"}


def figures(contents: Contents) -> Markup | None:
    """What the whole model costs, and what was measured of it."""
    inspection, compared = contents.inspection, contents.comparison
    rows = [list(row) for row in contents.figures]
    head = ["", "before", "after"]
    if compared is not None:
        rows.append(["FLOPs", *map(format_flops, compared.flops)])
        rows.append(["parameters", *map(format_flops, compared.parameters)])
        head = ["", "dense", "slim"]
    elif not rows:
        rows = [["FLOPs", format_flops(inspection.flops)]]
        rows.append(["parameters", format_flops(inspection.parameters)])
        head = ["", ""]
    body = [_row(row) for row in rows]
    parts: list[Markup] = [tag("table", tag("thead", _row(head, "th")), tag("tbody", *body))]
    if compared is not None:
        answer = (
            f"features differ by {compared.divergence:.2g} of their variance"
            if compared.agreement is None
            else f"{100 * compared.agreement:.1f} % of answers agree, "
            f"KL divergence {compared.divergence:.2g} nats"
        )
        parts.append(tag("p", f"Beside {compared.dense}, on {compared.data}: {answer}."))
    return section("In numbers", *parts)


def heat_maps(contents: Contents) -> Markup | None:
    """Heads by layers: width kept, and redundancy."""
    attention = [layer for layer in contents.layers if layer.heads]
    if not attention:
        return None
    kinds: tuple[UnitKind, ...] = ("qk", "v")
    parts = []
    for kind in kinds:
        parts.append(heat_map(f"{_NAMES[kind]}: share of width kept", _cells(attention, kind, _kept), 1.0))
    if contents.inspection.judged_by is not None:
        for kind in kinds:
            rows = _cells(attention, kind, _similar)
            most = max([0.01, *(cell[0] for _, cells in rows for cell in cells if cell)])
            title = f"{_NAMES[kind]}: redundancy (mean channel similarity), 0 to {most:.2f}"
            parts.append(heat_map(title, rows, most))
    told = "Rows are layers, columns are heads; the stronger the colour, the more. "
    told += "Point at a cell for its numbers; the table below has all of them."
    return section("Heads", tag("p", told), tag("div", *parts, class_="charts"))


def flops(contents: Contents) -> Markup | None:
    """Where FLOPs go, or, beside a dense model, where they went."""
    if contents.comparison is not None:
        dense, slim = contents.comparison.flops
        bars = [Bar("dense", 0, dense, "total", format_flops(dense))]
        left = dense
        for compared in contents.comparison.layers:
            saved = compared.flops[0] - compared.flops[1]
            family = "mlp" if "hidden" in compared.widths else "attention"
            bars.append(Bar(compared.name, left, left - saved, family, f"-{format_flops(saved)}"))
            left -= saved
        bars.append(Bar("slim", 0, slim, "total", format_flops(slim)))
        chart = waterfall("FLOPs that each layer saves", bars)
    else:
        layers = contents.inspection.layers
        rest = contents.inspection.flops - sum(layer.flops for layer in layers)
        bars, sofar = [Bar("outside these layers", 0, rest, "rest", format_flops(rest))], rest
        for layer in layers:
            family = "attention" if layer.heads else "mlp"
            told = f"{format_flops(layer.flops)} ({100 * layer.share:.1f} %)"
            bars.append(Bar(layer.name, sofar, sofar + layer.flops, family, told))
            sofar += layer.flops
        bars.append(Bar("total", 0, sofar, "total", format_flops(sofar)))
        chart = waterfall("FLOPs of each layer", bars)
    colours = {"attention": "attention", "mlp": "MLP", "total": "the whole model", "rest": "the rest"}
    if contents.comparison is not None:
        del colours["rest"]
    return section("FLOPs", legend(colours), chart)


def errors(contents: Contents) -> Markup | None:
    """What each layer gives beside the dense one."""
    if contents.comparison is None:
        return None
    layers = contents.comparison.layers
    lines = [
        Line("own error", [(i, layer.own_error) for i, layer in enumerate(layers)], 0.0),
        Line("error in its own model", [(i, layer.error) for i, layer in enumerate(layers)], 1.0),
    ]
    chart = line_chart(
        "Relative error of each layer's output", lines, across="layer, in the model's order", up="error"
    )
    rows = [
        _row(
            [
                layer.name,
                ", ".join(f"{kind} {dense} to {slim}" for kind, (dense, slim) in layer.widths.items()),
                format_flops(layer.flops[0]),
                format_flops(layer.flops[1]),
                f"{layer.own_error:.4f}",
                f"{layer.error:.4f}",
                f"{layer.agreement:.5f}",
            ]
        )
        for layer in layers
    ]
    heads = ["layer", "widths", "dense FLOPs", "slim FLOPs", "own error", "error", "agreement"]
    told = "Own error: given the dense model's input. Agreement: mean cosine of the two outputs of a token."
    return section(
        "Beside the dense model",
        legend({"d0": "own error", "d4": "error in its own model"}),
        chart,
        tag("p", told),
        scrolling(tag("table", tag("thead", _row(heads, "th")), tag("tbody", *rows))),
    )


def curves(contents: Contents) -> Markup | None:
    """Sensitivity curves and where the budget cut them."""
    if not contents.curves:
        return None
    charts = []
    for kind, name in _NAMES.items():
        own = [curve for curve in contents.curves if curve.kind == kind]
        if own:
            lines = [_curve_line(curve, place / max(len(own) - 1, 1)) for place, curve in enumerate(own)]
            charts.append(
                line_chart(
                    f"{name}: error against width",
                    lines,
                    across="share of width",
                    up="KL divergence, nats",
                    logarithmic=True,
                )
            )
    bought = "" if contents.budget is None else f" Dots: widths that {format_flops(contents.budget)} bought."
    told = "Estimated divergence of the answers when one unit alone is cut to a width and repaired." + bought
    return section(
        "Sensitivity",
        tag("p", told),
        legend({"d0": "first layers", "d2": "middle", "d4": "last layers"}),
        tag("div", *charts, class_="charts"),
    )


def search(contents: Contents) -> Markup | None:
    """How the search went, where indicators were trained."""
    steps = contents.steps
    if not steps:
        return None
    charts = [
        line_chart("Loss", [Line("loss", [(s.step, s.loss) for s in steps], 0.5)], across="step", up="loss"),
        line_chart(
            "FLOPs of the masked model",
            [Line("FLOPs", [(s.step, s.flops / 1e6) for s in steps], 0.5)],
            across="step",
            up="MFLOPs",
        ),
    ]
    kinds = [kind for kind in _NAMES if kind in steps[-1].kept]
    lines = [
        Line(_NAMES[kind], [(s.step, s.kept[kind]) for s in steps], place / 2)
        for place, kind in enumerate(kinds)
    ]
    if lines:
        charts.append(line_chart("Share of width kept", lines, across="step", up="share"))
    return section(
        "Search",
        legend({f"d{2 * place}": _NAMES[kind] for place, kind in enumerate(kinds)}),
        tag("div", *charts, class_="charts"),
    )


def history(inspection: Inspection) -> Markup | None:
    """What a slim file says of the commands that made it."""
    if not inspection.history:
        return None
    return section("History", tag("ol", *(tag("li", step(entry)) for entry in inspection.history)))


def section(title: str, *parts: str) -> Markup:
    """A part of the page under a heading."""
    name = "part-" + title.lower().replace(" ", "-")
    return tag("section", tag("h2", title, id=name), *parts, aria_labelledby=name)


def scrolling(table: Markup) -> Markup:
    """A table wider than the window scrolls by itself, also by keyboard."""
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label="table")


def _row(cells: Sequence[str], name: str = "td") -> Markup:
    if name == "th":
        return tag("tr", *(tag("th", cell, scope="col") for cell in cells))
    return tag("tr", tag("th", cells[0], scope="row"), *(tag("td", cell) for cell in cells[1:]))


def _cells(layers: Sequence[LayerReport], kind: UnitKind, value: Any) -> list[tuple[str, list[Any]]]:
    rows = []
    for layer in layers:
        unit = layer.units.get(kind)
        count = 0 if unit is None else unit.head_count
        cells = [value(layer, unit, head) if head < count else None for head in range(layer.heads or 0)]
        rows.append((layer.name, cells))
    return rows


def _kept(layer: LayerReport, unit: UnitReport, head: int) -> tuple[float, str]:
    share = unit.now / unit.dense
    return share, f"{layer.name}, head {head}: {unit.now} of {unit.dense} channels ({100 * share:.0f} %)"


def _similar(layer: LayerReport, unit: UnitReport, head: int) -> tuple[float, str] | None:
    if head >= len(unit.heads):
        return None
    found = unit.heads[head]
    told = (
        f"{layer.name}, head {head}: similarity {found.similarity:.3f}; {found.rank90} and {found.rank99} of "
        f"{unit.now} principal channels hold 90 and 99 % of the energy"
    )
    return found.similarity, told


def _curve_line(curve: StoredCurve, depth: float) -> Line:
    full = curve.points[-1][0]
    by_width = dict(curve.points)
    marked = None
    if curve.chosen in by_width:
        marked = (curve.chosen / full, by_width[curve.chosen])
    return Line(curve.layer, [(width / full, nats) for width, nats in curve.points], depth, marked)
