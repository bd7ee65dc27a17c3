"""Several budgets side by side: a table, and charts of accuracy and divergence against cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mhacut.budget import format_amount, format_flops
from mhacut.measuring.figures import ModelFigures
from mhacut.report.charts import Line, LineChart, is_empty

COST_FLOPS = "FLOPs, millions"
"""Name of the axis of FLOPs."""


@dataclass(frozen=True)
class Choice:
    """One model among several to choose from."""

    name: str
    """Budget as the user wrote it; ``dense`` for the dense model."""
    figures: ModelFigures
    divergence: float | None
    """Divergence from the dense model on held-out images: KL divergence in nats, or, for features, squared
    error over variance. None for the dense model itself."""
    page: str = ""
    """File name of its own report, beside the page that compares; "" without one."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values; ``size`` is in bytes, ``top1`` in percent."""
        evaluation = self.figures.evaluation
        return {
            "budget": self.name,
            "flops": self.figures.flops,
            "parameters": self.figures.parameters,
            "size": self.figures.size,
            "latency_ms": self.figures.latency_ms,
            "top1": None if evaluation is None else evaluation.top1,
            "divergence": self.divergence,
        }


def choice_rows(choices: Sequence[Choice], divergence: str) -> list[list[str]]:
    """Return a table of ``choices``, its headings first; columns that nothing fills are left out.

    Args:
        choices: the dense model first.
        divergence: heading of the column of divergences.
    """
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
    filled = {name: cell for name, cell in columns.items() if any(cell(one) is not None for one in choices)}
    return [list(filled), *([cell(one) or "" for cell in filled.values()] for one in choices)]


def choice_charts(choices: Sequence[Choice]) -> list[LineChart]:
    """Return charts of accuracy and divergence against each cost that is known."""
    costs: dict[str, Callable[[Choice], float | None]] = {
        COST_FLOPS: lambda one: one.figures.flops / 1e6,
        "parameters, millions": lambda one: one.figures.parameters / 1e6,
        "latency, ms": lambda one: one.figures.latency_ms,
    }
    values: dict[str, Callable[[Choice], float | None]] = {
        "top-1, %": lambda one: None if one.figures.evaluation is None else one.figures.evaluation.top1,
        "divergence": lambda one: one.divergence,
    }
    charts: list[LineChart] = []
    for value, of_value in values.items():
        for cost, of_cost in costs.items():
            found = [(one.name, of_cost(one), of_value(one)) for one in choices]
            points = sorted((x, y, name) for name, x, y in found if x is not None and y is not None)
            if len(points) < 2:
                continue
            line = Line("budgets", [(x, y) for x, y, _ in points], "attention")
            # A line of a single point for each budget, so that pointing at it shows its name.
            dots = [Line(name, [(x, y)], "attention", (x, y)) for x, y, name in points]
            logarithmic = value == "divergence"
            title = f"{value} against {cost.partition(',')[0]}"
            charts.append(LineChart(title, [line, *dots], cost, value, logarithmic))
    return [chart for chart in charts if not is_empty(chart)]  # a logarithm has no place for 0
