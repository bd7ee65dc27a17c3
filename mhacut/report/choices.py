"""Several budgets side by side: a table, and charts of accuracy and divergence against cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from mhacut.budget import format_amount, format_flops
from mhacut.measuring.accuracy import ModelFigures
from mhacut.report.charts import Line, line_chart
from mhacut.text import safe


@dataclass(frozen=True)
class Choice:
    """One model among several to choose from."""

    name: str
    """Budget as the user wrote it; ``dense`` for the dense model."""
    figures: ModelFigures
    divergence: float | None
    """Divergence from the dense model: KL divergence in nats, or, for features, squared error over variance.
    None for the dense model itself."""
    page: str = ""
    """File name of its own report, next to the page that compares; "" without one."""
    judged_on: str = ""
    """Number and name of the images of ``divergence``; "" for the dense model."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values; ``size`` is in bytes, ``top1`` in percent."""
        return {
            "budget": self.name,
            "flops": self.figures.flops,
            "parameters": self.figures.parameters,
            "size": self.figures.size,
            "latency_ms": self.figures.latency_ms,
            "top1": _top1(self),
            "divergence": self.divergence,
        }


def choice_rows(choices: Sequence[Choice], divergence: str) -> list[list[str]]:
    """Return a table of ``choices``, its headings first; columns that nothing fills are left out."""
    dense = choices[0].figures
    columns: dict[str, Callable[[Choice], str | None]] = {
        "budget": lambda one: one.name,
        "FLOPs": lambda one: format_flops(one.figures.flops),
        "of dense": lambda one: f"{100 * one.figures.flops / dense.flops:.1f}%",
        "parameters": lambda one: format_flops(one.figures.parameters),
        "file": lambda one: None if one.figures.size is None else format_amount(one.figures.size, "size"),
        "ms": lambda one: None if one.figures.latency_ms is None else f"{one.figures.latency_ms:.2f}",
        "top-1, %": lambda one: (
            None
            if one.figures.evaluation is None
            else f"{one.figures.evaluation.top1:.2f}{one.figures.evaluation.doubt}"
        ),
        divergence: lambda one: None if one.divergence is None else f"{one.divergence:.2g}",
    }
    # Columns that nothing was measured for are left out.
    filled = {name: cell for name, cell in columns.items() if any(cell(one) is not None for one in choices)}
    return [list(filled), *([cell(one) or "" for cell in filled.values()] for one in choices)]


def choice_charts(choices: Sequence[Choice], *, flops_only: bool = False) -> list[str]:
    """Return charts of accuracy and divergence against each cost that is known, or against FLOPs only."""
    # Not against the size of the file, which is the parameters' times their storage.
    costs: dict[str, Callable[[Choice], float | None]] = {
        "FLOPs, millions": lambda one: one.figures.flops / 1e6,
        "parameters, millions": lambda one: one.figures.parameters / 1e6,
        "latency, ms": lambda one: one.figures.latency_ms,
    }
    values: dict[str, Callable[[Choice], float | None]] = {
        "top-1, %": _top1,
        "divergence": lambda one: one.divergence,
    }
    charts = []
    for value, of_value in values.items():
        for cost, of_cost in list(costs.items())[: 1 if flops_only else None]:
            known = [(one, of_cost(one), of_value(one)) for one in choices]
            # By cost: budgets may be given in any order, and a line would turn back.
            points = sorted(
                (x, y, one.name, _error(one)) for one, x, y in known if x is not None and y is not None
            )
            if len(points) < 2:
                continue
            line = Line("budgets", [(x, y) for x, y, *_ in points])
            # A line of a single point for each budget, so that pointing at it shows its name.
            dots = [
                Line(name, [(x, y)], marked=(x, y), error=error if of_value is _top1 else 0.0)
                for x, y, name, error in points
            ]
            title = f"{value} against {cost.partition(',')[0]}"
            charts.append(line_chart(title, [line, *dots], cost, value, logarithmic=value == "divergence"))
    return [chart for chart in charts if chart]  # a logarithm has no place for 0


def html_table(rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Return a table for the cells of notebooks; the first column and the first row are headings.

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
    """Return lines for the cells of notebooks, escaped."""
    return "".join(f"<div>{escape(safe(line))}</div>" for line in lines)


def _top1(choice: Choice) -> float | None:
    return None if choice.figures.evaluation is None else choice.figures.evaluation.top1


def _error(choice: Choice) -> float:
    """Return the standard error of the top-1, in points."""
    return 0.0 if choice.figures.evaluation is None else choice.figures.evaluation.standard_error
