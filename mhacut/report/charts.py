"""Charts as SVG, for pages and notebooks: heat maps, waterfalls and lines.

Each function returns a ``<figure>`` that needs no style sheet and no script. Text and grid have the colour of
the page's text, and marks have colours of medium lightness, so that charts can be read on light and dark
paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from mhacut.text import safe

COLOURS: Mapping[str, str] = {
    "attention": "#4e87d3",
    "mlp": "#43a384",
    "total": "#828b9c",
    "rest": "#b58a5a",
}
"""Colours of bars by what they stand for."""
DEPTHS = ("#795cb7", "#4e87d3", "#43a384", "#c48e25", "#d96e35")
"""Colours of lines, from the first layers of a model to the last."""
_ROW = 18
"""Height in pixels, the unit of all coordinates, of a row of cells or of a bar."""
_LABEL = 170
"""Width of the names at the left; a character takes about 6.5."""
_NAME = 26
"""Characters of a name that fit there."""
_LEFT, _TOP, _WIDTH, _HEIGHT = 64, 10, 420, 220
"""The box in which lines are drawn."""
_EQUAL = 1e-4
"""Relative difference of values that an axis does not tell apart: its numbers have seven characters."""


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map."""

    value: float
    description: str
    """Text that is shown where the mouse points at the cell."""


@dataclass(frozen=True)
class Bar:
    """One step of a waterfall."""

    label: str
    start: float
    end: float
    colour: str
    """A name of :data:`COLOURS`."""
    description: str
    """Text beside the bar."""


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str = DEPTHS[1]
    marked: tuple[float, float] | None = None
    """A point of the line that stands out."""


def depth_colour(fraction: float) -> str:
    """Colour of a layer at ``fraction`` of the model's depth, in 0..1."""
    return DEPTHS[round(fraction * (len(DEPTHS) - 1))]


def heat_map(title: str, rows: Sequence[tuple[str, Sequence[Cell | None]]], maximum: float) -> str:
    """Draw cells shaded by their values, 0 palest.

    Args:
        title: heading of the chart.
        rows: name and cells of each row, one cell per column; None leaves a gap.
        maximum: value of the strongest shade.
    """
    columns = max((len(cells) for _, cells in rows), default=0)
    # Wide enough to point at; a map of many heads grows wider rather than unreadable.
    size = max(10, min(24, 360 // max(columns, 1)))
    top = 20
    figure, svg = _figure(title, _LABEL + columns * size + 4, top + len(rows) * _ROW + 4)
    # Numbers of two digits are wider than a narrow cell: every fourth is enough to count by.
    for column in range(0, columns, 1 if size > 16 else 4):
        _text(svg, _LABEL + (column + 0.5) * size, 14, str(column), "middle")
    for number, (name, cells) in enumerate(rows):
        y = top + number * _ROW
        _text(svg, _LABEL - 6, y + 13, _short(name), "end")
        for column, cell in enumerate(cells):
            if cell is not None:
                # Never quite 0: a cell must be told from a gap.
                shade = 0.04 + 0.96 * min(max(cell.value / maximum, 0.0), 1.0)
                place = {"x": _LABEL + column * size, "y": y, "width": size - 1, "height": _ROW - 1}
                look = {"fill": DEPTHS[-1], "fill-opacity": shade, "stroke": "currentColor"}
                _shape(svg, "rect", {**place, **look, "stroke-opacity": 0.15}, cell.description)
    return _written(figure)


def waterfall(title: str, bars: Sequence[Bar]) -> str:
    """Draw horizontal bars, one per row, usually each beginning where the previous one ends."""
    width, right = 420, 90
    maximum = max((max(bar.start, bar.end) for bar in bars), default=1.0) or 1.0
    figure, svg = _figure(title, _LABEL + width + right, 8 + len(bars) * _ROW)
    for number, bar in enumerate(bars):
        low, high = sorted((bar.start / maximum, bar.end / maximum))
        y = 4 + number * _ROW
        place = {"x": _LABEL + low * width, "y": y + 2, "height": _ROW - 4}
        # At least a pixel wide: a layer that saves nothing still marks its place.
        look = {"width": max((high - low) * width, 1.0), "fill": COLOURS[bar.colour]}
        _text(svg, _LABEL - 6, y + 13, _short(bar.label), "end")
        _shape(svg, "rect", {**place, **look}, f"{bar.label}: {bar.description}")
        _text(svg, _LABEL + high * width + 5, y + 13, bar.description, "start")
    return _written(figure)


def line_chart(
    title: str, lines: Sequence[Line], x_label: str, y_label: str, *, logarithmic: bool = False
) -> str:
    """Draw lines over a common pair of axes.

    Args:
        title: heading of the chart.
        lines: lines to draw; those without points are left out.
        x_label: name of the horizontal axis.
        y_label: name of the vertical axis.
        logarithmic: make the vertical axis logarithmic; points at or below 0 then have no place.

    Returns:
        The figure; empty if there is nothing to draw.
    """
    scaled = math.log10 if logarithmic else float
    drawn = [(line, [(x, scaled(y)) for x, y in line.points if y > 0 or not logarithmic]) for line in lines]
    drawn = [(line, points) for line, points in drawn if points]
    if not drawn:
        return ""
    xs, ys = zip(*(point for _, points in drawn for point in points), strict=True)
    x_ends, y_ends = _ends(min(xs), max(xs)), _ends(min(ys), max(ys))
    if logarithmic:  # whole powers of ten
        low = math.floor(min(ys))
        y_ends = float(low), float(max(math.ceil(max(ys)), low + 1))

    def place(x: float, y: float) -> tuple[float, float]:
        along, above = (x - x_ends[0]) / (x_ends[1] - x_ends[0]), (y - y_ends[0]) / (y_ends[1] - y_ends[0])
        return _LEFT + along * _WIDTH, _TOP + (1 - above) * _HEIGHT  # SVG counts downwards

    figure, svg = _figure(title, _LEFT + _WIDTH + 20, _TOP + _HEIGHT + 40)
    _axes(svg, (x_label, x_ends), (y_label, y_ends), logarithmic)
    for line, points in drawn:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        look = {"fill": "none", "stroke": line.colour, "stroke-width": 1.5}
        _shape(svg, "polyline", {"points": path, **look}, line.label)
        if line.marked is not None and (line.marked[1] > 0 or not logarithmic):
            x, y = place(line.marked[0], scaled(line.marked[1]))
            description = f"{line.label}: {line.marked[0]:.3g}, {line.marked[1]:.3g}"
            _shape(svg, "circle", {"cx": x, "cy": y, "r": 3.5, "fill": line.colour}, description)
    return _written(figure)


def _axes(
    svg: Element, x_axis: tuple[str, tuple[float, float]], y_axis: tuple[str, tuple[float, float]], log: bool
) -> None:
    """Draw the grid, and numbers and names of the axes, each given as its name and its ends."""
    (x_label, x_ends), (y_label, y_ends) = x_axis, y_axis
    right, bottom, middle = _LEFT + _WIDTH, _TOP + _HEIGHT, _TOP + _HEIGHT / 2
    for step in range(5):
        x, y = _LEFT + _WIDTH * step / 4, bottom - _HEIGHT * step / 4
        value = _between(y_ends, step / 4)
        grid = {"stroke": "currentColor", "stroke-opacity": 0.2}
        _shape(svg, "line", {"x1": _LEFT, "x2": right, "y1": y, "y2": y, **grid})
        _text(svg, _LEFT - 6, y + 4, f"{10**value:.1e}" if log else _number(value, y_ends), "end")
        _text(svg, x, bottom + 16, _number(_between(x_ends, step / 4), x_ends), "middle")
    _text(svg, _LEFT + _WIDTH / 2, bottom + 34, x_label, "middle")
    _text(svg, 14, middle, y_label, "middle", transform=f"rotate(-90 14 {middle:.0f})")


def _figure(title: str, width: float, height: float) -> tuple[Element, Element]:
    """Return a figure, and the SVG in it."""
    figure = Element("figure")
    SubElement(figure, "figcaption").text = safe(title)
    size = {"viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}", "height": f"{height:g}"}
    svg = SubElement(figure, "svg", {"role": "img", "aria-label": safe(title), **size, "font-size": "11"})
    return figure, svg


def _shape(svg: Element, name: str, attributes: Mapping[str, object], description: str = "") -> Element:
    """Add a shape, with a text that is shown where the mouse points at it."""
    shape = SubElement(svg, name, {key: _attribute(value) for key, value in attributes.items()})
    if description:
        SubElement(shape, "title").text = safe(description)
    return shape


def _text(svg: Element, x: float, y: float, text: str, anchor: str, **attributes: str) -> None:
    place = {"x": x, "y": y, "text-anchor": anchor, "fill": "currentColor"}
    _shape(svg, "text", {**place, **attributes}).text = safe(text)


def _written(figure: Element) -> str:
    return ElementTree.tostring(figure, encoding="unicode")


def _attribute(value: object) -> str:
    # A hundredth of a pixel is not seen, and a page has thousands of numbers.
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _ends(low: float, high: float) -> tuple[float, float]:
    """Ends of an axis; where all values are equal or nearly, with room below, above if they are 0."""
    if high - low > _EQUAL * max(abs(low), abs(high)):
        return low, high
    return (high - 0.02 * abs(high), high) if high else (0.0, 1.0)


def _number(value: float, ends: tuple[float, float]) -> str:
    """Text of a number on an axis, with enough digits to tell quarters of the axis apart."""
    # A step is a quarter of the axis: its digits lie behind those that both ends share.
    digits = math.log10(max(map(abs, ends)) / (ends[1] - ends[0])) + 2
    return f"{value:.{max(3, math.ceil(digits))}g}"


def _between(ends: tuple[float, float], fraction: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * fraction


def _short(name: str) -> str:
    """Shorten a name to its end, in which layers differ; the table has the whole name."""
    return name if len(name) <= _NAME else "…" + name[1 - _NAME :]
