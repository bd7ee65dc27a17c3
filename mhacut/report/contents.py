"""Contents of a report."""

from __future__ import annotations

from dataclasses import dataclass

from mhacut.inspection.compare import Comparison
from mhacut.inspection.layers import Inspection, LayerReport
from mhacut.pruning.indicators import SearchStep
from mhacut.report.pareto import Choice
from mhacut.report.stored_curves import StoredCurve


@dataclass(frozen=True)
class Contents:
    """Everything that a report shows."""

    inspection: Inspection
    summary: str
    """Summary of the inspection in one line."""
    layers: tuple[LayerReport, ...]
    """Layers to show, in the order to show them."""
    comparison: Comparison | None = None
    curves: tuple[StoredCurve, ...] = ()
    """Sensitivity curves of the last cut."""
    budget: int | None = None
    """Budget in FLOPs of the cut that the curves belong to."""
    steps: tuple[SearchStep, ...] = ()
    """Log of the search, where indicators were trained."""
    figures: tuple[tuple[str, str, str], ...] = ()
    """Measurements of a run: name, value before, value after."""
    choices: tuple[Choice, ...] = ()
    """Models of a run with several budgets, the dense one first."""
