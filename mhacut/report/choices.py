"""Comparison of several budgets: a table, and charts of accuracy and divergence against FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from mhacut.budget import format_amount, format_flops
from mhacut.measuring.accuracy import ModelFigures
from mhacut.report.charts import Line, line_chart
from mhacut.text import filled_columns, safe


@dataclass(frozen=True)
class Choice:
    """The dense model, or the model of one budget."""

    name: str
    """Budget as the user wrote it, or ``dense``."""
    figures: ModelFigures
    divergence: float | None
    """KL divergence from the dense model in nats, or for features squared error over variance."""
    page: str = ""
    """File name of the model's own report, or ""."""
    judged_on: str = ""
    """Description of the images of ``divergence``."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values: ``size`` in bytes, ``top1`` in percent."""
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
    """Return a table with headings. The first choice is the dense model. Empty columns are left out."""
    headings = ["budget", "FLOPs", "of dense", "parameters", "file", "ms", "top-1, %", divergence]
    return filled_columns([headings, *(_cells(choice, choices[0].figures.flops) for choice in choices)])


def _cells(choice: Choice, dense_flops: int) -> list[str]:
    figures = choice.figures
    size, latency, evaluation = figures.size, figures.latency_ms, figures.evaluation
    return [
        choice.name,
        format_flops(figures.flops),
        f"{100 * figures.flops / dense_flops:.1f}%",
        format_flops(figures.parameters),
        "" if size is None else format_amount(size, "size"),
        "" if latency is None else f"{latency:.2f}",
        "" if evaluation is None else f"{evaluation.top1:.2f}{evaluation.doubt}",
        "" if choice.divergence is None else f"{choice.divergence:.2g}",
    ]


def choice_charts(choices: Sequence[Choice]) -> list[str]:
    """Return charts of top-1 accuracy and divergence against FLOPs."""
    values: dict[str, Callable[[Choice], float | None]] = {
        "top-1, %": _top1,
        "divergence": lambda choice: choice.divergence,
    }
    charts = []
    for name, value_of in values.items():
        # Sorted by FLOPs: budgets have any order, and the line would turn back.
        points = sorted(
            (choice.figures.flops / 1e6, value, choice.name, _standard_error(choice))
            for choice in choices
            if (value := value_of(choice)) is not None
        )
        if len(points) < 2:
            continue
        line = Line("budgets", [(x, y) for x, y, *_ in points])
        # A line with 1 point for each budget: the tooltip of the point is the budget.
        dots = [
            Line(label, [(x, y)], marked=(x, y), error=error if value_of is _top1 else 0.0)
            for x, y, label, error in points
        ]
        logarithmic = name == "divergence"
        charts.append(
            line_chart(
                f"{name} against FLOPs", [line, *dots], "FLOPs, millions", name, logarithmic=logarithmic
            )
        )
    return [chart for chart in charts if chart]  # a logarithmic chart is empty if all values are 0


def html_table(rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Return a table for notebooks. The first column and the first row are headings.

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


def _top1(choice: Choice) -> float | None:
    return None if choice.figures.evaluation is None else choice.figures.evaluation.top1


def _standard_error(choice: Choice) -> float:
    return 0.0 if choice.figures.evaluation is None else choice.figures.evaluation.standard_error
