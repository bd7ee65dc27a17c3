"""Charts as inline SVG: heat maps, a waterfall, lines. Colours are the style sheet's, in light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mhacut.report.markup import Markup, join, tag

_ROW = 18
_LABEL = 170
"""Pixels for names at the left; a character takes about 6.5."""
_NAME = 26
"""Characters of a name that fit there."""


@dataclass(frozen=True)
class Bar:
    """One step of a waterfall."""

    label: str
    start: float
    end: float
    kind: str
    """Class in the style sheet: ``total``, ``attention``, ``mlp`` or ``rest``."""
    told: str
    """For whoever points at it."""


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    label: str
    points: Sequence[tuple[float, float]]
    depth: float
    """0..1, chooses its colour."""
    marked: tuple[float, float] | None = None
    """A point of it that stands out."""


def heat_map(
    title: str, rows: Sequence[tuple[str, Sequence[tuple[float, str] | None]]], most: float
) -> Markup:
    """Cells shaded by their value.

    Args:
        title: of the chart, read to those who do not see it.
        rows: a name, and per column a value and what to tell of it, or None.
        most: the value of the strongest shade.
    """
    columns = max((len(cells) for _, cells in rows), default=0)
    size = max(10, min(24, 360 // max(columns, 1)))
    top = 20
    parts = [
        _text(_LABEL + (column + 0.5) * size, 14, str(column), "middle")
        for column in range(columns)
        if column % (1 if size > 16 else 4) == 0
    ]
    for number, (name, cells) in enumerate(rows):
        y = top + number * _ROW
        parts.append(_text(_LABEL - 6, y + 13, _short(name), "end"))
        for column, cell in enumerate(cells):
            if cell is not None:
                value, told = cell
                shade = 0.04 + 0.96 * min(max(value / most, 0.0), 1.0)
                parts.append(
                    tag(
                        "rect",
                        tag("title", told),
                        class_="cell",
                        x=_LABEL + column * size,
                        y=y,
                        width=size - 1,
                        height=_ROW - 1,
                        fill_opacity=f"{shade:.2f}",
                    )
                )
    return _figure(title, _LABEL + columns * size + 4, top + len(rows) * _ROW + 4, parts)


def waterfall(title: str, bars: Sequence[Bar]) -> Markup:
    """Bars that start where the one before ended."""
    width, right = 420, 90
    most = max((max(bar.start, bar.end) for bar in bars), default=1.0) or 1.0
    parts: list[Markup] = []
    for number, bar in enumerate(bars):
        low, high = sorted((bar.start / most, bar.end / most))
        y = 4 + number * _ROW
        parts.append(_text(_LABEL - 6, y + 13, _short(bar.label), "end"))
        parts.append(
            tag(
                "rect",
                tag("title", f"{bar.label}: {bar.told}"),
                class_=f"bar {bar.kind}",
                x=_LABEL + low * width,
                y=y + 2,
                width=max((high - low) * width, 1.0),
                height=_ROW - 4,
            )
        )
        parts.append(_text(_LABEL + high * width + 5, y + 13, bar.told, "start"))
    return _figure(title, _LABEL + width + right, 8 + len(bars) * _ROW, parts)


def line_chart(
    title: str, lines: Sequence[Line], *, across: str, up: str, logarithmic: bool = False
) -> Markup:
    """Lines over a common pair of axes.

    Args:
        title: of the chart.
        lines: with at least one point each.
        across: what the horizontal axis is.
        up: what the vertical one is.
        logarithmic: of the vertical axis; points at or below 0 are left out.
    """
    width, height, left, bottom, top = 420, 220, 64, 40, 10
    shown = [(line, [(x, y) for x, y in line.points if not logarithmic or y > 0]) for line in lines]
    points = [point for _, own in shown for point in own]
    if not points:
        return tag("p", f"{title}: nothing to draw")
    height_of = math.log10 if logarithmic else float
    xs, ys = [x for x, _ in points], [height_of(y) for _, y in points]
    if logarithmic:
        ys = [float(math.floor(min(ys))), float(math.ceil(max(ys)))]
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        along = (x - x_low) / ((x_high - x_low) or 1)
        above = (height_of(y) - y_low) / ((y_high - y_low) or 1)
        return left + along * width, top + (1 - above) * height

    parts: list[Markup] = []
    for step in range(5):
        value = y_low + (y_high - y_low) * step / 4
        y = top + (1 - step / 4) * height
        told = f"{10**value:.0e}" if logarithmic else f"{value:.3g}"
        parts.append(tag("line", class_="grid", x1=left, x2=left + width, y1=y, y2=y))
        parts.append(_text(left - 6, y + 4, told, "end"))
        x = left + width * step / 4
        parts.append(_text(x, top + height + 16, f"{x_low + (x_high - x_low) * step / 4:.3g}", "middle"))
    parts.append(_text(left + width / 2, top + height + 34, across, "middle"))
    parts.append(
        tag(
            "text",
            up,
            x=14,
            y=top + height / 2,
            text_anchor="middle",
            transform=f"rotate(-90 14 {top + height / 2:.0f})",
        )
    )
    for line, own in shown:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in own))
        shade = f"d{round(line.depth * 4)}"
        parts.append(tag("polyline", tag("title", line.label), class_=f"line {shade}", points=path))
        if line.marked is not None and (not logarithmic or line.marked[1] > 0):
            x, y = place(*line.marked)
            told = f"{line.label}: {line.marked[0]:.3g}, {line.marked[1]:.3g}"
            parts.append(tag("circle", tag("title", told), class_=f"mark {shade}", cx=x, cy=y, r=3.5))
    return _figure(title, left + width + 20, top + height + bottom, parts)


def legend(entries: Mapping[str, str]) -> Markup:
    """What colours stand for: class in the style sheet to meaning."""
    items = [tag("li", tag("span", class_=f"swatch {kind}"), told) for kind, told in entries.items()]
    return tag("ul", *items, class_="legend")


def _figure(title: str, width: float, height: float, parts: Sequence[Markup]) -> Markup:
    drawn = tag(
        "svg",
        *parts,
        role="img",
        aria_label=title,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=f"{width:.0f}",
        height=f"{height:.0f}",
    )
    return tag("figure", tag("figcaption", title), join(drawn))


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return tag("text", text, x=x, y=y, text_anchor=anchor)


def _short(name: str) -> str:
    """The end of a name tells layers apart; the whole is in the table."""
    return name if len(name) <= _NAME else "…" + name[1 - _NAME :]
