"""Draw accuracy against FLOPs and against time, from results/wide430.json, for light and for dark paper.

    python examples/benchmarks/figure.py [FOLDER]

Writes accuracy-light.svg and accuracy-dark.svg; FOLDER is docs/images by default. The second panel has the
rows that ``kept.py`` timed in ONNX Runtime, and is left out without any. No plotting library draws them, so
that the same rows give the same bytes everywhere and a test can compare them.
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
WIDTH, PANEL, LEGEND = 480, 260, 76
"""Width of the figure, which a phone shows nearly as it is, and heights of a panel and of the legend."""
LEFT, RIGHT, TOP, BOTTOM = 44, 462, 28, 212
"""Edges of the plot in a panel."""


@dataclass(frozen=True)
class Method:
    """One line of the figure."""

    name: str
    """Name in the rows."""
    label: str
    light: str
    dark: str
    """Colours on light and dark paper."""
    ours: bool = False


METHODS = (
    Method("mhacut-tokens-balanced", "mhacut", "#b3430f", "#ff9a5c", True),
    Method("mhacut-unlabelled-auto-balanced", "mhacut, channels alone", "#2864b4", "#74aaf2", True),
    Method("tome", "ToMe, untrained", "#a96d00", "#e0b04a"),
    Method("corp", "CORP", "#2a8267", "#5cc4a2"),
    Method("tp-taylor-uniform", "Torch-Pruning, Taylor", "#6b7485", "#99a3b3"),
)
INK = {"light": ("#24292f", "#d8dee4"), "dark": ("#e6edf3", "#3d444d")}
"""Colours of text and of the grid."""


@dataclass(frozen=True)
class Axis:
    """The horizontal axis of a panel."""

    label: str
    ends: tuple[float, float]
    ticks: Sequence[float]
    cost: str
    """Name of its numbers in the rows."""
    factor: float = 1.0

    def x(self, cost: float) -> float:
        return LEFT + (cost - self.ends[0]) / (self.ends[1] - self.ends[0]) * (RIGHT - LEFT)

    def points(self, document: Any, method: str) -> list[tuple[float, float]]:
        """Return (cost, top-1 in percent) of a method, the dense model first."""
        rows = [row for row in document["rows"] if row["method"] in ("dense", method)]
        found = [
            (self.factor * row[self.cost], row["top1"]) for row in rows if self.cost in row and "top1" in row
        ]
        return sorted(found, reverse=True)


def axes(document: Any) -> list[Axis]:
    """Return the axis of each panel."""
    found = [Axis("FLOPs kept, %", (20, 100), (25, 37.5, 50, 75, 100), "ratio", 100)]
    times = [row["onnx_ms"] for row in document["rows"] if "onnx_ms" in row]
    if len(times) > 1:
        step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if max(times) / step < 7)
        most = step * (max(times) // step + 1)
        ticks = [step * number for number in range(int(most // step) + 1)]
        found.append(Axis("ms for an image, ONNX Runtime, one thread", (0, most), ticks, "onnx_ms"))
    return found


def figure(document: Any, paper: str) -> str:
    """Return the SVG; ``paper`` is light or dark."""
    return "\n".join(_elements(document, paper)) + "\n"


def _elements(document: Any, paper: str) -> Iterator[str]:
    ink, panels = INK[paper][0], axes(document)
    height = LEGEND + PANEL * len(panels)
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="sans-serif" font-size="14" fill="{ink}" role="img">'
    )
    costs = "FLOPs and time" if len(panels) > 1 else "FLOPs"
    yield f"<title>Top-1 accuracy against {costs} of an ImageNet ViT-Ti, without fine-tuning</title>"
    for number, method in enumerate(METHODS):
        x, y = (12, 250)[number % 2], 16 + 22 * (number // 2)
        yield f'<line x1="{x}" x2="{x + 30}" y1="{y}" y2="{y}" {_stroke(method, paper)}/>'
        weight = ' font-weight="bold"' if method.ours else ""
        yield f'<text x="{x + 38}" y="{y + 5}"{weight}>{method.label}</text>'
    for number, axis in enumerate(panels):
        yield f'<g transform="translate(0 {LEGEND + PANEL * number})">'
        yield from _panel(document, axis, paper)
        yield "</g>"
    yield "</svg>"


def _panel(document: Any, axis: Axis, paper: str) -> Iterator[str]:
    ink, grid = INK[paper]
    for percent in range(0, 101, 20):
        y = _y(percent)
        yield f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{grid}"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">{percent}</text>'
    for tick in axis.ticks:
        yield f'<text x="{axis.x(tick):.1f}" y="{BOTTOM + 18}" text-anchor="middle">{tick:g}</text>'
    yield f'<text x="{RIGHT}" y="{BOTTOM + 38}" text-anchor="end">{axis.label}</text>'
    yield f'<text x="8" y="{TOP - 14}">top-1, %</text>'
    for method in METHODS:
        places = axis.points(document, method.name)
        if len(places) > 1:
            yield from _line(axis, places, method, paper)
    if dense := axis.points(document, "dense"):
        (cost, top1), *_ = dense
        x, y = axis.x(cost), _y(top1)
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{ink}"/>'
        yield f'<text x="{x:.1f}" y="{y - 10:.1f}" text-anchor="end">dense</text>'


def _stroke(method: Method, paper: str) -> str:
    width, dashes = (3, "") if method.ours else (2, ' stroke-dasharray="6 4"')
    return f'stroke="{getattr(method, paper)}" stroke-width="{width}"{dashes}'


def _line(axis: Axis, places: Sequence[tuple[float, float]], method: Method, paper: str) -> Iterator[str]:
    """Draw a method's points, joined."""
    drawn = [(axis.x(cost), _y(top1)) for cost, top1 in places]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
    yield f'<polyline points="{path}" fill="none" {_stroke(method, paper)}/>'
    for (x, y), (cost, top1) in zip(drawn[1:], places[1:], strict=True):
        title = f"{method.label}: {top1:.1f} % at {cost:.1f} {axis.label}"
        dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{getattr(method, paper)}">'
        yield f"{dot}<title>{title}</title></circle>"


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
