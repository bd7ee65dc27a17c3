"""Contents of a report."""

from __future__ import annotations

from dataclasses import dataclass, field

from mhacut.inspection.compare import Comparison
from mhacut.inspection.layers import Inspection, LayerReport
from mhacut.pruning.indicators import SearchStep
from mhacut.report.pareto import Choice
from mhacut.report.stored_curves import StoredCurves


@dataclass(frozen=True)
class Contents:
    """Everything that a report shows."""

    inspection: Inspection
    summary: str
    """Summary of the inspection in one line."""
    layers: tuple[LayerReport, ...]
    """Layers to show, in the order to show them."""
    comparison: Comparison | None = None
    sensitivity: StoredCurves = field(default_factory=StoredCurves)
    """Sensitivity curves of the last cut."""
    steps: tuple[SearchStep, ...] = ()
    """Log of the search, where indicators were trained."""
    figures: tuple[tuple[str, str, str], ...] = ()
    """Measurements of a run: name, value before, value after."""
    choices: tuple[Choice, ...] = ()
    """Models of a run with several budgets, the dense one first."""
