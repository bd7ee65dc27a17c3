"""Descriptions of the report's charts: data, labels, scales and colours.

:mod:`mhacut.report.svg` draws them for the page, :mod:`mhacut.report.picture` with matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COLOURS: Mapping[str, tuple[str, str]] = {
    "heat": ("#b3430f", "#ff9a5c"),
    "attention": ("#2864b4", "#74aaf2"),
    "mlp": ("#2a8267", "#5cc4a2"),
    "total": ("#6b7485", "#99a3b3"),
    "rest": ("#a5adba", "#626c7c"),
    "depth-0": ("#3b1c7a", "#b79cf5"),
    "depth-1": ("#2864b4", "#74aaf2"),
    "depth-2": ("#2a8267", "#5cc4a2"),
    "depth-3": ("#a96d00", "#e0b04a"),
    "depth-4": ("#b3430f", "#ff9a5c"),
}
"""Name of each colour, a class of the style sheet, to its values on a light and on a dark background."""


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map."""

    value: float
    description: str
    """Text that is shown where the mouse points at the cell."""


@dataclass(frozen=True)
class HeatMap:
    """Cells shaded by their value, 0 palest."""

    title: str
    rows: Sequence[tuple[str, Sequence[Cell | None]]]
    """Name of each row and its cells, one per column; None leaves a gap."""
    maximum: float
    """Value of the strongest shade."""

    @property
    def columns(self) -> int:
        """Number of columns of the longest row."""
        return max((len(cells) for _, cells in self.rows), default=0)


@dataclass(frozen=True)
class Bar:
    """One step of a waterfall."""

    label: str
    start: float
    end: float
    colour: str
    """A name of :data:`COLOURS`."""
    description: str
    """Written beside the bar."""


@dataclass(frozen=True)
class Waterfall:
    """Horizontal bars, one per row, usually each beginning where the previous one ends."""

    title: str
    bars: Sequence[Bar]

    @property
    def maximum(self) -> float:
        """Largest end of a bar, for the scale; never 0."""
        return max((max(bar.start, bar.end) for bar in self.bars), default=1.0) or 1.0


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    """A name of :data:`COLOURS`."""
    marked: tuple[float, float] | None = None
    """A point of the line that stands out."""


@dataclass(frozen=True)
class LineChart:
    """Lines over a common pair of axes."""

    title: str
    lines: Sequence[Line]
    x_label: str
    y_label: str
    logarithmic: bool = False
    """Whether the vertical axis is logarithmic; points at or below 0 are then left out."""

    def drawable(self) -> list[Line]:
        """Lines that have points to draw, without those that a logarithmic axis has no place for."""
        if not self.logarithmic:
            return [line for line in self.lines if line.points]
        lines = []
        for line in self.lines:
            points = [(x, y) for x, y in line.points if y > 0]
            marked = line.marked if line.marked is not None and line.marked[1] > 0 else None
            if points:
                lines.append(Line(line.label, points, line.colour, marked))
        return lines


Chart = HeatMap | Waterfall | LineChart


def depth_colour(fraction: float) -> str:
    """Name of the colour of a layer at ``fraction`` of the model's depth, in 0..1."""
    return f"depth-{round(fraction * 4)}"


def is_empty(chart: Chart) -> bool:
    """Whether there is nothing to draw."""
    if isinstance(chart, LineChart):
        return not chart.drawable()
    return not (chart.bars if isinstance(chart, Waterfall) else chart.rows)
