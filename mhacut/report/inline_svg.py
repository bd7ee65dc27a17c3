"""Charts as SVG for notebooks and other pages: without style sheet, for light and dark backgrounds."""

from __future__ import annotations

from html import escape

from mhacut.report.charts import COLOURS, Chart
from mhacut.report.svg import Shape, draw
from mhacut.text import safe


def chart_html(chart: Chart) -> str:
    """Return ``chart``, which is not empty, as a figure; on narrow screens it shrinks.

    Text and grid have the colour of the page's text. It is not known whether the page is light or dark, so
    lines have the mean of the two values in :data:`mhacut.report.charts.COLOURS`.
    """
    drawing = draw(chart)
    title = escape(safe(drawing.title))
    size = f'viewBox="0 0 {drawing.width:g} {drawing.height:g}" width="{drawing.width:g}"'
    shapes = "".join(map(_element, drawing.shapes))
    return (
        f'<div><div>{title}</div><svg role="img" aria-label="{title}" {size} '
        f'style="max-width: 100%; height: auto" font-size="13">{shapes}</svg></div>'
    )


def _element(shape: Shape) -> str:
    attributes = {name: value for name, value in shape.attributes.items() if name != "class"} | _look(shape)
    written = "".join(f' {name}="{escape(safe(_text(value)))}"' for name, value in attributes.items())
    title = f"<title>{escape(safe(shape.title))}</title>" if shape.title else ""
    return f"<{shape.element}{written}>{title}{escape(safe(shape.text))}</{shape.element}>"


def _look(shape: Shape) -> dict[str, object]:
    """Return attributes in place of the rules for the shape's class in the report's style sheet."""
    kind, _, colour = str(shape.attributes.get("class", "")).partition(" ")
    if kind == "grid":
        return {"stroke": "currentColor", "stroke-opacity": "0.2"}
    if kind == "line":
        return {"fill": "none", "stroke": _between(*COLOURS[colour]), "stroke-width": "1.5"}
    return {"fill": _between(*COLOURS[colour]) if colour else "currentColor"}


def _between(light: str, dark: str) -> str:
    """Return the mean of two colours.

    >>> _between("#000000", "#fffefc")
    '#7f7f7e'
    """
    parts = ((int(light[at : at + 2], 16) + int(dark[at : at + 2], 16)) // 2 for at in (1, 3, 5))
    return "#" + "".join(f"{part:02x}" for part in parts)


def _text(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
