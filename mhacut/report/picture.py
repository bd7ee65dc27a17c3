"""The report's charts as one PNG, drawn by matplotlib, which is imported when a picture is asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mhacut.inspection.layers import LayerReport, UnitReport
from mhacut.options.base import PathLike
from mhacut.plan import UnitKind
from mhacut.report.contents import Contents
from mhacut.runtime.files import write_whole

_ROW_INCHES = 0.22


def heat_values(
    layers: Sequence[LayerReport], kind: UnitKind, value: Callable[[UnitReport, int], float]
) -> list[list[float]]:
    """One row per layer, one column per head; NaN where there is no such head, or nothing of that kind."""
    most = max((layer.heads or 0 for layer in layers), default=0)
    rows = []
    for layer in layers:
        unit = layer.units.get(kind)
        known = [] if unit is None else [value(unit, head) for head in range(unit.head_count)]
        rows.append(known + [math.nan] * (most - len(known)))
    return rows


def _similarity(unit: UnitReport, head: int) -> float:
    return unit.heads[head].similarity if head < len(unit.heads) else math.nan


def write_picture(
    path: PathLike, contents: Contents, overwrite: bool, input_path: str | os.PathLike[str] | None
) -> Path:
    """Draw width kept and redundancy of all heads, and the FLOPs of all layers.

    Args:
        path: the file; its directory is created.
        contents: what to show.
        overwrite: replace an existing file.
        input_path: the checkpoint, never replaced.

    Raises:
        OutputError: the file must not or cannot be written.
    """
    from matplotlib.figure import Figure

    attention = [layer for layer in contents.layers if layer.heads]
    judged = contents.inspection.judged_by is not None
    height = 2.2 + _ROW_INCHES * (len(attention) * (1 + judged) + len(contents.layers))
    figure: Any = Figure(figsize=(9, height), layout="constrained")
    # Names and verdicts may hold dollar signs, which would be read as formulas.
    figure.suptitle(_plain(contents.verdict), fontsize=9, wrap=True)
    ratios = [len(attention)] * (1 + judged) + [len(contents.layers)]
    grid = figure.add_gridspec(len(ratios), 2, height_ratios=[max(ratio, 1) for ratio in ratios])
    kinds: tuple[UnitKind, ...] = ("qk", "v")
    for column, kind in enumerate(kinds):
        kept = heat_values(attention, kind, lambda unit, head: unit.now / unit.dense)
        _heat(
            figure, figure.add_subplot(grid[0, column]), f"{kind}: share of width kept", attention, kept, 1.0
        )
        if judged:
            alike = heat_values(attention, kind, _similarity)
            most = max([0.01, *(value for row in alike for value in row if value == value)])
            axes = figure.add_subplot(grid[1, column])
            _heat(figure, axes, f"{kind}: mean channel similarity", attention, alike, most)
    axes = figure.add_subplot(grid[-1, :])
    axes.barh(
        [_plain(layer.name) for layer in contents.layers],
        [100 * layer.share for layer in contents.layers],
        color=["#2864b4" if layer.heads else "#2a8267" for layer in contents.layers],
    )
    axes.invert_yaxis()
    axes.tick_params(labelsize=6)
    axes.set_xlabel("share of FLOPs, % (blue: attention, green: MLP)", fontsize=8)

    def write(temporary: Path) -> None:
        figure.savefig(temporary, format="png", dpi=120)

    write_whole(path, write, overwrite=overwrite, input_path=input_path)
    return Path(path)


def _heat(
    figure: Any, axes: Any, title: str, layers: Sequence[LayerReport], values: list[list[float]], most: float
) -> None:
    if not values or not values[0]:
        axes.set_axis_off()
        return
    from matplotlib.ticker import MaxNLocator

    drawn = axes.imshow(values, vmin=0, vmax=most, cmap="viridis", aspect="auto")
    axes.set_title(title, fontsize=8)
    axes.set_xlabel("head", fontsize=7)
    axes.set_yticks(range(len(layers)), [_plain(layer.name) for layer in layers])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=6)
    figure.colorbar(drawn, ax=axes).ax.tick_params(labelsize=6)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")
