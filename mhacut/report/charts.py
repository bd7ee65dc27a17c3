"""Bar and line charts as SVG, for HTML pages and notebooks.

Each function returns a ``<figure>`` without style sheet or script. Its colours suit light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from mhacut.text import safe

DEPTHS = ("#795cb7", "#4e87d3", "#43a384", "#c48e25", "#d96e35")
"""Colours of lines in charts, from the first to the last layer of the model."""
_ROW = 18
"""Height of a table row in pixels."""
_LABEL = 116
"""Width of the row names in pixels, about 6.5 per character."""
_NAME = 17
"""Largest number of characters of a row name."""
_ALL = 356
"""Width of a chart in pixels. A chart fits on a phone's screen."""
_LEFT, _TOP, _WIDTH, _HEIGHT = 56, 24, 280, 190
"""Position and size of the area between the axes, in pixels."""
_EQUAL = 1e-4
"""Relative difference below which axis values count as equal, because axis labels have at most 7
characters."""


class Share(NamedTuple):
    value: float
    """Filled fraction of the bar, from 0 to 1."""
    text: str
    """Text beside the bar, at most 4 characters."""
    description: str
    """Tooltip of the bar."""


@dataclass(frozen=True)
class Line:
    label: str
    points: Sequence[tuple[float, float]]
    colour: str = DEPTHS[1]
    marked: tuple[float, float] | None = None
    """Point (x, y) at which a dot is drawn."""


def depth_colour(fraction: float) -> str:
    return DEPTHS[round(fraction * (len(DEPTHS) - 1))]


def share_table(
    title: str, columns: Mapping[str, str], rows: Sequence[tuple[str, Mapping[str, Share]]]
) -> str:
    """Draw a table of bars as HTML. ``columns`` maps headings to colours. A row may lack columns."""
    top, size = 20, (_ALL - _LABEL) / max(len(columns), 1)
    figure, svg = new_figure(title, _ALL, top + len(rows) * _ROW + 4)
    for number, (name, _) in enumerate(rows):
        _text(svg, _LABEL - 6, top + number * _ROW + 13, _short(name), "end")
    for column, (heading, colour) in enumerate(columns.items()):
        x, width = _LABEL + column * size, size - 34  # 34 for the number of 4 characters
        _text(svg, x, 13, heading, "start")
        for number, (_, shares) in enumerate(rows):
            if (share := shares.get(heading)) is not None:
                y, filled = top + number * _ROW, width * min(max(share.value, 0.0), 1.0)
                for part, opacity in ((width, 0.2), (filled, 1.0)):
                    place = {"x": x, "y": y + 3, "width": part, "height": _ROW - 6}
                    look = {"fill": colour, "fill-opacity": opacity}
                    _shape(svg, "rect", {**place, **look}, share.description)
                _text(svg, x + width + 3, y + 13, share.text, "start")
    return figure_html(figure)


def line_chart(
    title: str, lines: Sequence[Line], x_label: str, y_label: str, *, logarithmic: bool = False
) -> str:
    """Draw lines as HTML. The result is empty if there are no points. A logarithmic axis omits 0."""
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

    figure, svg = new_figure(title, _ALL, _TOP + _HEIGHT + 40)
    _axes(svg, (x_label, x_ends), (y_label, y_ends), logarithmic)
    for line, points in drawn:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        look = {"fill": "none", "stroke": line.colour, "stroke-width": 1.5}
        _shape(svg, "polyline", {"points": path, **look}, line.label)
        if line.marked is not None and (line.marked[1] > 0 or not logarithmic):
            x, y = place(line.marked[0], scaled(line.marked[1]))
            description = f"{line.label}: {line.marked[0]:.3g}, {line.marked[1]:.3g}"
            _shape(svg, "circle", {"cx": x, "cy": y, "r": 3.5, "fill": line.colour}, description)
    return figure_html(figure)


def _axes(
    svg: Element, x_axis: tuple[str, tuple[float, float]], y_axis: tuple[str, tuple[float, float]], log: bool
) -> None:
    """Draw the grid and the axes. An axis is (label, (lowest value, highest value))."""
    (x_label, x_ends), (y_label, y_ends) = x_axis, y_axis
    right, bottom = _LEFT + _WIDTH, _TOP + _HEIGHT
    for step in range(5):
        x, y = _LEFT + _WIDTH * step / 4, bottom - _HEIGHT * step / 4
        value = _between(y_ends, step / 4)
        grid = {"stroke": "currentColor", "stroke-opacity": 0.2}
        _shape(svg, "line", {"x1": _LEFT, "x2": right, "y1": y, "y2": y, **grid})
        _text(svg, _LEFT - 6, y + 4, f"{10**value:.1e}" if log else _number(value, y_ends), "end")
        _text(svg, x, bottom + 16, _number(_between(x_ends, step / 4), x_ends), "middle")
    _text(svg, _LEFT + _WIDTH / 2, bottom + 34, x_label, "middle")
    _text(svg, 0, 12, y_label, "start")  # above the numbers, because long numbers leave no room beside them


def new_figure(title: str, width: float, height: float) -> tuple[Element, Element]:
    figure = Element("figure")
    SubElement(figure, "figcaption").text = safe(title)
    size = {"viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}", "height": f"{height:g}"}
    svg = SubElement(figure, "svg", {"role": "img", "aria-label": safe(title), **size, "font-size": "11"})
    return figure, svg


def _shape(svg: Element, name: str, attributes: Mapping[str, object], description: str = "") -> Element:
    shape = SubElement(svg, name, {key: _attribute(value) for key, value in attributes.items()})
    if description:
        SubElement(shape, "title").text = safe(description)
    return shape


def _text(svg: Element, x: float, y: float, text: str, anchor: str) -> None:
    place = {"x": x, "y": y, "text-anchor": anchor, "fill": "currentColor"}
    _shape(svg, "text", place).text = safe(text)


def figure_html(figure: Element) -> str:
    return ElementTree.tostring(figure, encoding="unicode")


def _attribute(value: object) -> str:
    # Two decimals keep a page with thousands of numbers small.
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _ends(low: float, high: float) -> tuple[float, float]:
    if high - low > _EQUAL * max(abs(low), abs(high)):
        return low, high
    return (high - 0.02 * abs(high), high) if high else (0.0, 1.0)


def _number(value: float, ends: tuple[float, float]) -> str:
    # A step is a quarter of the axis. Its digits follow the digits that both ends share.
    digits = math.log10(max(map(abs, ends)) / (ends[1] - ends[0])) + 2
    return f"{value:.{max(3, math.ceil(digits))}g}"


def _between(ends: tuple[float, float], fraction: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * fraction


def _short(name: str) -> str:
    return name if len(name) <= _NAME else "…" + name[1 - _NAME :]
