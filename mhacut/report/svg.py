"""Charts as SVG elements for the page; the template writes and escapes them, the style sheet colours them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mhacut.report.charts import Chart, HeatMap, Line, LineChart, Waterfall

_ROW = 18
"""Height in pixels of a row of cells or of a bar."""
_LABEL = 170
"""Width in pixels of the names at the left; a character takes about 6.5."""
_NAME = 26
"""Characters of a name that fit there."""
_ALIKE = 1e-4
"""Relative difference of values that an axis does not tell apart: its numbers have seven characters."""


@dataclass(frozen=True)
class Shape:
    """One SVG element."""

    element: str
    attributes: Mapping[str, object]
    text: str = ""
    title: str = ""
    """Text that is shown where the mouse points at the element."""


@dataclass(frozen=True)
class Drawing:
    """One chart, ready to be written."""

    title: str
    width: float
    """Width in pixels, the unit of all coordinates."""
    height: float
    shapes: Sequence[Shape]


def draw(chart: Chart) -> Drawing:
    """Return the elements of ``chart``, which must not be empty, each in its place."""
    if isinstance(chart, HeatMap):
        return _heat_map(chart)
    if isinstance(chart, Waterfall):
        return _waterfall(chart)
    return _line_chart(chart)


def _heat_map(chart: HeatMap) -> Drawing:
    size = max(10, min(24, 360 // max(chart.columns, 1)))
    top = 20
    every = 1 if size > 16 else 4
    shapes = [
        _text(_LABEL + (column + 0.5) * size, 14, str(column), "middle")
        for column in range(0, chart.columns, every)
    ]
    for number, (name, cells) in enumerate(chart.rows):
        y = top + number * _ROW
        shapes.append(_text(_LABEL - 6, y + 13, _short(name), "end"))
        for column, cell in enumerate(cells):
            if cell is not None:
                shade = 0.04 + 0.96 * min(max(cell.value / chart.maximum, 0.0), 1.0)
                place = {"x": _LABEL + column * size, "y": y, "width": size - 1, "height": _ROW - 1}
                look = {"class": "cell heat", "fill-opacity": shade}
                shapes.append(Shape("rect", {**look, **place}, title=cell.description))
    return Drawing(chart.title, _LABEL + chart.columns * size + 4, top + len(chart.rows) * _ROW + 4, shapes)


def _waterfall(chart: Waterfall) -> Drawing:
    width, right = 420, 90
    shapes = []
    for number, bar in enumerate(chart.bars):
        low, high = sorted((bar.start / chart.maximum, bar.end / chart.maximum))
        y = 4 + number * _ROW
        place = {
            "x": _LABEL + low * width,
            "y": y + 2,
            "width": max((high - low) * width, 1.0),
            "height": _ROW - 4,
        }
        shapes += [
            _text(_LABEL - 6, y + 13, _short(bar.label), "end"),
            Shape("rect", {"class": f"bar {bar.colour}", **place}, title=f"{bar.label}: {bar.description}"),
            _text(_LABEL + high * width + 5, y + 13, bar.description, "start"),
        ]
    return Drawing(chart.title, _LABEL + width + right, 8 + len(chart.bars) * _ROW, shapes)


class _Axes:
    """Scales of a line chart, and the box in which its lines are drawn."""

    left, top, width, height = 64, 10, 420, 220

    def __init__(self, lines: Sequence[Line], logarithmic: bool) -> None:
        self.scaled = math.log10 if logarithmic else float
        points = [point for line in lines for point in line.points]
        xs, ys = [x for x, _ in points], [self.scaled(y) for _, y in points]
        self.logarithmic = logarithmic
        self.x_range = _spread(min(xs), max(xs))
        self.y_range = _spread(min(ys), max(ys))
        if logarithmic:  # whole powers of ten
            low = math.floor(min(ys))
            self.y_range = float(low), float(max(math.ceil(max(ys)), low + 1))

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Coordinates of a point of the data."""
        (x_low, x_high), (y_low, y_high) = self.x_range, self.y_range
        along = (x - x_low) / (x_high - x_low)
        above = (self.scaled(y) - y_low) / (y_high - y_low)
        return self.left + along * self.width, self.top + (1 - above) * self.height

    def shapes(self, x_label: str, y_label: str) -> list[Shape]:
        """Grid, numbers and names of the axes."""
        right, bottom = self.left + self.width, self.top + self.height
        middle = self.top + self.height / 2
        shapes = []
        for step in range(5):
            x, y = self.left + self.width * step / 4, bottom - self.height * step / 4
            value = _between(self.y_range, step / 4)
            number = f"{10**value:.1e}" if self.logarithmic else _number(value, self.y_range)
            shapes += [
                Shape("line", {"class": "grid", "x1": self.left, "x2": right, "y1": y, "y2": y}),
                _text(self.left - 6, y + 4, number, "end"),
                _text(x, bottom + 16, _number(_between(self.x_range, step / 4), self.x_range), "middle"),
            ]
        shapes.append(_text(self.left + self.width / 2, bottom + 34, x_label, "middle"))
        turned = {"x": 14, "y": middle, "text-anchor": "middle", "transform": f"rotate(-90 14 {middle:.0f})"}
        return [*shapes, Shape("text", turned, y_label)]


def _line_chart(chart: LineChart) -> Drawing:
    lines = chart.drawable()
    axes = _Axes(lines, chart.logarithmic)
    shapes = axes.shapes(chart.x_label, chart.y_label)
    for line in lines:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (axes.place(*point) for point in line.points))
        shapes.append(Shape("polyline", {"class": f"line {line.colour}", "points": points}, title=line.label))
        if line.marked is not None:
            x, y = axes.place(*line.marked)
            title = f"{line.label}: {line.marked[0]:.3g}, {line.marked[1]:.3g}"
            dot = {"class": f"mark {line.colour}", "cx": x, "cy": y, "r": 3.5}
            shapes.append(Shape("circle", dot, title=title))
    return Drawing(chart.title, axes.left + axes.width + 20, axes.top + axes.height + 40, shapes)


def _spread(low: float, high: float) -> tuple[float, float]:
    """Ends of an axis; where all values are equal or nearly, with room below, above if they are 0."""
    if high - low > _ALIKE * max(abs(low), abs(high)):
        return low, high
    return (high - 0.02 * abs(high), high) if high else (0.0, 1.0)


def _number(value: float, ends: tuple[float, float]) -> str:
    """Text of a number on an axis, with enough digits to tell quarters of the axis apart."""
    digits = math.log10(max(map(abs, ends)) / (ends[1] - ends[0])) + 2
    return f"{value:.{max(3, math.ceil(digits))}g}"


def _between(ends: tuple[float, float], fraction: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * fraction


def _text(x: float, y: float, text: str, anchor: str) -> Shape:
    return Shape("text", {"x": x, "y": y, "text-anchor": anchor}, text)


def _short(name: str) -> str:
    """Shorten a name to its end, in which layers differ; the table has the whole name."""
    return name if len(name) <= _NAME else "…" + name[1 - _NAME :]
