"""The report's charts as one PNG, drawn by matplotlib, which is imported only when it is needed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mhacut.options.base import PathLike
from mhacut.report.charts import COLOURS, Chart, HeatMap, LineChart, Waterfall
from mhacut.report.contents import Contents
from mhacut.report.sections import Section, sections
from mhacut.runtime.files import write_whole
from mhacut.text import safe

_WIDTH = 9.0
_ROW_HEIGHT = 0.2  # of a row of cells, or of a bar
_MARGIN = 0.9
"""Height of a chart's title and axis; all three are in inches."""
_LIGHT = {name: light for name, (light, _) in COLOURS.items()}


def write_picture(
    path: PathLike, contents: Contents, overwrite: bool, input_path: str | os.PathLike[str] | None
) -> Path:
    """Draw all charts of the report, section by section, as a PNG; it is written whole or not at all.

    Args:
        path: the file; its directory is created.
        contents: what to show.
        overwrite: replace an existing file.
        input_path: the checkpoint, never replaced.

    Raises:
        OutputError: the file must not or cannot be written.
    """
    figure = _picture(contents)

    def write(temporary: Path) -> None:
        figure.savefig(temporary, format="png", dpi=120)

    write_whole(path, write, overwrite=overwrite, input_path=input_path)
    return Path(path)


def _picture(contents: Contents) -> Any:
    from matplotlib.figure import Figure

    shown = [section for section in sections(contents) if section.charts]
    heights = [sum(map(_row_height, _rows(section.charts))) for section in shown]
    figure: Any = Figure(figsize=(_WIDTH, 0.8 + sum(heights)), layout="constrained")
    figure.suptitle(_plain(contents.summary), fontsize=9, wrap=True)
    parts = figure.subfigures(len(shown), 1, height_ratios=heights, squeeze=False)[:, 0]
    for section, part in zip(shown, parts, strict=True):
        _draw_section(part, section)
    return figure


def _draw_section(figure: Any, section: Section) -> None:
    from matplotlib.patches import Patch

    rows = _rows(section.charts)
    grid = figure.add_gridspec(len(rows), 2, height_ratios=list(map(_row_height, rows)))
    for number, row in enumerate(rows):
        for column, chart in enumerate(row):
            place = grid[number, :] if isinstance(chart, Waterfall) else grid[number, column]
            axes = figure.add_subplot(place)
            axes.set_title(_plain(chart.title), fontsize=8)
            axes.tick_params(labelsize=6)
            _draw(axes, chart)
    if section.legend:
        patches = [Patch(color=_LIGHT[colour], label=meaning) for colour, meaning in section.legend.items()]
        figure.legend(handles=patches, fontsize=6, loc="outside lower center", ncols=len(patches))


def _draw(axes: Any, chart: Chart) -> None:
    if isinstance(chart, HeatMap):
        _draw_heat_map(axes, chart)
    elif isinstance(chart, Waterfall):
        _draw_waterfall(axes, chart)
    else:
        _draw_lines(axes, chart)


def _draw_heat_map(axes: Any, chart: HeatMap) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    shades = LinearSegmentedColormap.from_list("heat", ["#ffffff", _LIGHT["heat"]])
    drawn = axes.imshow(heat_values(chart), vmin=0, vmax=chart.maximum, cmap=shades, aspect="auto")
    axes.set_xlabel("head", fontsize=7)
    axes.set_yticks(range(len(chart.rows)), [_plain(name) for name, _ in chart.rows])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.figure.colorbar(drawn, ax=axes).ax.tick_params(labelsize=6)


def heat_values(chart: HeatMap) -> list[list[float]]:
    """Return one value per row and column; NaN where the chart has a gap."""
    rows = []
    for _, cells in chart.rows:
        values = [math.nan if cell is None else cell.value for cell in cells]
        rows.append(values + [math.nan] * (chart.columns - len(values)))
    return rows


def _draw_waterfall(axes: Any, chart: Waterfall) -> None:
    bars = chart.bars
    places = range(len(bars))  # not the names, which may be equal
    starts, ends = [bar.start for bar in bars], [bar.end for bar in bars]
    widths = [end - start for start, end in zip(starts, ends, strict=True)]
    axes.barh(places, widths, left=starts, color=[_LIGHT[bar.colour] for bar in bars])
    for place, bar in zip(places, bars, strict=True):
        beside = max(bar.start, bar.end) + 0.01 * chart.maximum
        axes.text(beside, place, _plain(bar.description), fontsize=6, verticalalignment="center")
    axes.set_yticks(places, [_plain(bar.label) for bar in bars])
    axes.set_xlim(0, 1.15 * chart.maximum)  # with room for what is written beside the bars
    axes.set_xticks([])
    axes.invert_yaxis()


def _draw_lines(axes: Any, chart: LineChart) -> None:
    for line in chart.drawable():
        xs, ys = zip(*line.points, strict=True)
        axes.plot(xs, ys, color=_LIGHT[line.colour], linewidth=1)
        if line.marked is not None:
            axes.plot(*line.marked, color=_LIGHT[line.colour], marker="o", markersize=3)
    axes.set_yscale("log" if chart.logarithmic else "linear")
    axes.set_xlabel(chart.x_label, fontsize=7)
    axes.set_ylabel(chart.y_label, fontsize=7)


def _rows(charts: Sequence[Chart]) -> list[list[Chart]]:
    """Rows of two charts each; a waterfall has a row of its own."""
    rows: list[list[Chart]] = []
    for chart in charts:
        alone = isinstance(chart, Waterfall)
        if rows and not alone and len(rows[-1]) == 1 and not isinstance(rows[-1][0], Waterfall):
            rows[-1].append(chart)
        else:
            rows.append([chart])
    return rows


def _row_height(charts: Sequence[Chart]) -> float:
    return max(map(_height, charts))


def _height(chart: Chart) -> float:
    if isinstance(chart, LineChart):
        return 2.5
    return _MARGIN + _ROW_HEIGHT * len(chart.rows if isinstance(chart, HeatMap) else chart.bars)


def _plain(text: str) -> str:
    """Text whose dollar signs do not begin a formula."""
    return safe(text).replace("$", r"\$")
