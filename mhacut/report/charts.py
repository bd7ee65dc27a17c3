"""Charts as SVG, for pages and notebooks: tables of shares, bars and lines.

Each function returns a ``<figure>`` that needs no style sheet and no script. Text and grid have the colour of
the page's text, and marks have colours of medium lightness, so that charts can be read on light and dark
paper. Charts are as wide as the screen of a phone.
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
_LABEL = 116
"""Width of the names at the left; a character takes about 6.5."""
_NAME = 17
"""Characters of a name that fit there."""
_ALL = 356
"""Width of a chart."""
_LEFT, _TOP, _WIDTH, _HEIGHT = 56, 24, 280, 190
"""The box in which lines are drawn."""
_EQUAL = 1e-4
"""Relative difference of values that an axis does not tell apart: its numbers have seven characters."""


@dataclass(frozen=True)
class Share:
    """A part of a whole, as a bar with a number."""

    value: float
    """In 0..1."""
    text: str
    """Number beside the bar; four characters at most."""
    description: str
    """Text that is shown where the mouse points at the bar."""


@dataclass(frozen=True)
class Bar:
    """A bar, or a piece of one; pieces of one bar have one label."""

    label: str
    start: float
    end: float
    colour: str
    """A name of :data:`COLOURS`."""
    description: str
    """Text beside the bar, of its last piece."""


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str = DEPTHS[1]
    marked: tuple[float, float] | None = None
    """A point of the line that stands out."""
    error: float = 0.0
    """Standard error of the marked point, upwards and downwards."""


def depth_colour(fraction: float) -> str:
    """Colour of a layer at ``fraction`` of the model's depth, in 0..1."""
    return DEPTHS[round(fraction * (len(DEPTHS) - 1))]


def share_table(
    title: str, columns: Mapping[str, str], rows: Sequence[tuple[str, Mapping[str, Share]]]
) -> str:
    """Draw a bar for each row and column, filled by its share of the whole."""
    top, size = 20, (_ALL - _LABEL) / max(len(columns), 1)
    figure, svg = new_figure(title, _ALL, top + len(rows) * _ROW + 4)
    for number, (name, _) in enumerate(rows):
        _text(svg, _LABEL - 6, top + number * _ROW + 13, _short(name), "end")
    for column, (heading, colour) in enumerate(columns.items()):
        x, width = _LABEL + column * size, size - 34  # a number of four characters stands behind
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


def bar_chart(title: str, bars: Sequence[Bar]) -> str:
    """Draw horizontal bars, one per row; pieces with the label of the one before them stand in its row."""
    width = _ALL - _LABEL - 76
    maximum = max((max(bar.start, bar.end) for bar in bars), default=1.0) or 1.0
    labels = [bar.label for bar in bars]
    begins = [index for index, label in enumerate(labels) if index == 0 or label != labels[index - 1]]
    figure, svg = new_figure(title, _ALL, 8 + len(begins) * _ROW)
    row = -1
    for index, bar in enumerate(bars):
        low, high = sorted((bar.start / maximum, bar.end / maximum))
        if index in begins:
            row += 1
            _text(svg, _LABEL - 6, 4 + row * _ROW + 13, _short(bar.label), "end")
        y = 4 + row * _ROW
        place = {"x": _LABEL + low * width, "y": y + 2, "height": _ROW - 4}
        # At least a pixel wide: a layer that costs nothing still marks its place.
        look = {"width": max((high - low) * width, 1.0), "fill": COLOURS[bar.colour]}
        _shape(svg, "rect", {**place, **look}, f"{bar.label}: {bar.description}")
        if index + 1 == len(bars) or index + 1 in begins:
            _text(svg, _LABEL + high * width + 5, y + 13, bar.description, "start")
    return figure_html(figure)


def line_chart(
    title: str, lines: Sequence[Line], x_label: str, y_label: str, *, logarithmic: bool = False
) -> str:
    """Draw lines over a common pair of axes."""
    scaled = math.log10 if logarithmic else float
    drawn = [(line, [(x, scaled(y)) for x, y in line.points if y > 0 or not logarithmic]) for line in lines]
    drawn = [(line, points) for line, points in drawn if points]
    if not drawn:
        return ""
    xs, ys = zip(*(point for _, points in drawn for point in points), strict=True)
    for line, _ in drawn:
        if line.marked is not None and line.error:
            ys += tuple(scaled(max(line.marked[1] + sign * line.error, 1e-9)) for sign in (-1, 1))
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
            if line.error:
                description += f" ± {line.error:.2g}"
                ends = [place(line.marked[0], line.marked[1] + sign * line.error)[1] for sign in (-1, 1)]
                look = {"stroke": line.colour, "stroke-width": 1.5}
                _shape(svg, "line", {"x1": x, "x2": x, "y1": ends[0], "y2": ends[1], **look})
            _shape(svg, "circle", {"cx": x, "cy": y, "r": 3.5, "fill": line.colour}, description)
    return figure_html(figure)


def _axes(
    svg: Element, x_axis: tuple[str, tuple[float, float]], y_axis: tuple[str, tuple[float, float]], log: bool
) -> None:
    """Draw the grid, and numbers and names of the axes, each given as its name and its ends."""
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
    _text(svg, 0, 12, y_label, "start")  # above the numbers: beside them, long ones reach into it


def new_figure(title: str, width: float, height: float) -> tuple[Element, Element]:
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


def _text(svg: Element, x: float, y: float, text: str, anchor: str) -> None:
    place = {"x": x, "y": y, "text-anchor": anchor, "fill": "currentColor"}
    _shape(svg, "text", place).text = safe(text)


def figure_html(figure: Element) -> str:
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
