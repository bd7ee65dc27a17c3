"""Comparison of several budgets: a table, and charts of accuracy and divergence against FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from mhacut.measuring.accuracy import Figure
from mhacut.report.charts import Line, line_chart
from mhacut.text import filled_columns, safe


class Choice(NamedTuple):
    budget: str
    """Budget as the user wrote it, for example ``50%``."""
    figures: Sequence[Figure]
    """Measured values of the dense and the pruned model, such as FLOPs. The divergence comes last."""
    page: str = ""
    """File name of the pruned model's own report; an empty text without a report."""


def choice_rows(choices: Sequence[Choice]) -> list[list[str]]:
    """Return table rows: headings, the dense model, and a row per budget. Empty columns are left out."""
    first = choices[0].figures
    rows = [["budget", *(figure.heading for figure in first)]]
    rows.append(["dense", *(figure.text(figure.dense) for figure in first)])
    rows += [[budget, *(figure.text(figure.slim) for figure in figures)] for budget, figures, _ in choices]
    return filled_columns(rows)


def choice_charts(choices: Sequence[Choice]) -> list[str]:
    charts = []
    for name, logarithmic in (("top-1", False), (choices[0].figures[-1].name, True)):
        points: list[tuple[float, float, str]] = []
        for budget, figures, _ in choices:
            by_name = {figure.name: figure for figure in figures}
            if name in by_name:
                flops, figure = by_name["FLOPs"], by_name[name]
                ends = ((flops.dense, figure.dense, "dense"), (flops.slim, figure.slim, budget))
                points += [(x / 1e6, y, label) for x, y, label in ends if x is not None and y is not None]
        # Sorted by FLOPs: budgets have any order, and the line would turn back.
        points = sorted(set(points))
        if len(points) > 1:
            line = Line("budgets", [(x, y) for x, y, _ in points])
            # A line with 1 point for each budget: the tooltip of the point is the budget.
            lines = [line, *(Line(label, [(x, y)], marked=(x, y)) for x, y, label in points)]
            title = f"{name} against FLOPs"
            charts.append(line_chart(title, lines, "FLOPs, millions", name, logarithmic=logarithmic))
    return [chart for chart in charts if chart]  # a logarithmic chart is empty if all values are 0


def html_table(rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Return an HTML table for notebooks. The first row and the first column are headings.

    >>> html_table([["<vit>", "dense"], ["FLOPs", "1.26G"]])
    '<table><tr><th>&lt;vit&gt;</th><th>dense</th></tr><tr><th>FLOPs</th><td>1.26G</td></tr></table>'
    """
    lines = []
    for number, row in enumerate(rows):
        tags = ["th" if number == 0 or column == 0 else "td" for column in range(len(row))]
        cells = (f"<{tag}>{escape(safe(cell))}</{tag}>" for tag, cell in zip(tags, row, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>{html_lines(notes)}"


def html_lines(lines: Sequence[str]) -> str:
    return "".join(f"<div>{escape(safe(line))}</div>" for line in lines)
