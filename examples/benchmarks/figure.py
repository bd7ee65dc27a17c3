"""Draw accuracy against FLOPs on the real model, from results/wide430.json, for light and for dark paper.

    python examples/benchmarks/figure.py [FOLDER]

Writes accuracy-light.svg and accuracy-dark.svg; FOLDER is docs/images by default. No plotting library draws
them, so that the same rows give the same bytes everywhere and a test can compare them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS = HERE / "results" / "wide430.json"
IMAGES = HERE.parents[1] / "docs" / "images"
WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 600, 20, 344
"""Edges of the plot."""
LEAST_FLOPS = 30
"""Percent of the FLOPs at the left edge."""


@dataclass(frozen=True)
class Method:
    """One line of the figure."""

    name: str
    """Name in the rows."""
    label: str
    light: str
    dark: str
    """Colours on light and dark paper."""
    place: tuple[float, float]
    """Start of the label, in percent of FLOPs and of top-1."""
    ours: bool = False


METHODS = (
    Method("mhacut-tokens-balanced", "mhacut, channels and tokens", "#b3430f", "#ff9a5c", (38, 93), True),
    Method("tome", "ToMe", "#a96d00", "#e0b04a", (43, 69)),
    Method("mhacut-unlabelled-auto-balanced", "mhacut, channels", "#2864b4", "#74aaf2", (57.5, 63), True),
    Method("corp", "CORP", "#2a8267", "#5cc4a2", (57.5, 27)),
    Method("tp-taylor-uniform", "Torch-Pruning, Taylor", "#6b7485", "#99a3b3", (66, 5)),
)
INK = {"light": ("#24292f", "#d8dee4"), "dark": ("#e6edf3", "#3d444d")}
"""Colours of text and of the grid."""


def points(document: Any, method: str) -> list[tuple[float, float]]:
    """Return (percent of FLOPs, top-1 in percent) of a method, the dense model first."""
    rows = [row for row in document["rows"] if row["method"] in ("dense", method)]
    found = [(100 * row["ratio"], row["top1"]) for row in rows if row["top1"] is not None]
    return sorted(found, reverse=True)


def figure(document: Any, paper: str) -> str:
    """Return the SVG; ``paper`` is light or dark."""
    return "\n".join(_elements(document, paper)) + "\n"


def _elements(document: Any, paper: str) -> Iterator[str]:
    ink, grid = INK[paper]
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="sans-serif" font-size="13" fill="{ink}" role="img">'
    )
    yield "<title>Top-1 accuracy against FLOPs of an ImageNet ViT-Ti, without fine-tuning</title>"
    for percent in range(0, 101, 20):
        y = _y(percent)
        yield f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{grid}"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{percent}</text>'
    for flops in (37.5, 50, 75, 100):
        yield f'<text x="{_x(flops):.1f}" y="{BOTTOM + 20}" text-anchor="middle">{flops:g} %</text>'
    middle = (TOP + BOTTOM) / 2
    yield f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">FLOPs kept</text>'
    turned = f'transform="rotate(-90 18 {middle})"'
    yield f'<text x="18" y="{middle}" text-anchor="middle" {turned}>top-1, %</text>'
    for method in METHODS:
        colour = method.light if paper == "light" else method.dark
        yield from _line(points(document, method.name), method, colour)
    x, y = _x(100), _y(points(document, "dense")[0][1])
    yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{ink}"/>'
    yield f'<text x="{x:.1f}" y="{y - 12:.1f}" text-anchor="middle">dense</text>'
    yield "</svg>"


def _line(places: Sequence[tuple[float, float]], method: Method, colour: str) -> Iterator[str]:
    """Draw a method's points, joined, and its label."""
    drawn = [(_x(flops), _y(top1)) for flops, top1 in places]
    width, dashes = (3, "") if method.ours else (2, ' stroke-dasharray="6 4"')
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashes}/>'
    for (x, y), (flops, top1) in zip(drawn[1:], places[1:], strict=True):
        title = f"{method.label}: {top1:.1f} % at {flops:.1f} % of the FLOPs"
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"><title>{title}</title></circle>'
    weight = ' font-weight="bold"' if method.ours else ""
    x, y = _x(method.place[0]), _y(method.place[1])
    yield f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}"{weight}>{method.label}</text>'


def _x(flops: float) -> float:
    return LEFT + (flops - LEAST_FLOPS) / (100 - LEAST_FLOPS) * (RIGHT - LEFT)


def _y(top1: float) -> float:
    return BOTTOM - top1 / 100 * (BOTTOM - TOP)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES
    folder.mkdir(parents=True, exist_ok=True)
    document = json.loads(ROWS.read_text())
    for paper in INK:
        (folder / f"accuracy-{paper}.svg").write_text(figure(document, paper))


if __name__ == "__main__":
    main()
