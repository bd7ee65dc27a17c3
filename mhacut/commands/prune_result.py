"""Result of ``mhacut prune``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mhacut.checkpoint.provenance import Provenance
from mhacut.commands.prune_targets import Reached
from mhacut.data import Preprocessing
from mhacut.measuring.figures import ModelFigures
from mhacut.plan import Plan, UnitKey
from mhacut.pruning.constraints import Constraint
from mhacut.pruning.curves import Curve
from mhacut.pruning.indicators import SearchStep
from mhacut.pruning.repair import UnitRepair
from mhacut.report.pareto import Choice

MUCH = 0.2
"""Divergence in nats that is much: a tenth of the answers of an ImageNet ViT-Ti change."""


@dataclass(frozen=True)
class PruneResult:
    """Outcome of :func:`prune`."""

    output: Path | None
    """The slim file; None after a dry run."""
    architecture: str
    plan: Plan
    """In the indices of the model that was read."""
    budget: int
    """FLOPs."""
    dense: ModelFigures
    """Figures of the model that was read."""
    slim: ModelFigures
    """Figures of the file that was written, or after a dry run of the model in memory."""
    data: str
    """Description of the calibration images."""
    preprocessing: Preprocessing
    """Preprocessing of all images, which the slim file states."""
    provenance: Provenance
    """Origin of each value in ``preprocessing``."""
    not_prunable: tuple[str, ...]
    """Lines that name what cannot be cut exactly, or is never cut, and why."""
    repairs: Mapping[UnitKey, UnitRepair]
    """Outcome of the repair of each unit; empty without repair."""
    device: str
    latency_batch_size: int
    """Images per batch of ``latency_ms``."""
    seconds: Mapping[str, float]
    """Wall time of each stage."""
    log: tuple[SearchStep, ...]
    """Steps of the indicators, where they were trained."""
    curves: Mapping[UnitKey, Curve]
    """Estimated KL divergence in nats at each width of every unit; empty where no curve was needed."""
    report: Path | None
    """Page about the run; None when not asked for."""
    divergence: float
    """Divergence of the slim model from the dense one on held-out images (:attr:`judged_on`), see
    :class:`mhacut.pruning.distill.Divergence`."""
    divergence_of: Literal["answers", "features"]
    """KL divergence in nats of a classifier's outputs, or squared error of features over their variance."""
    judged_on: int
    """Number of those images. They chose how strongly to refit: on others, expect a larger divergence."""
    divergence_with_tokens: float | None
    """Divergence in nats that merges of tokens alone would leave at the same budget, where the cut of
    channels left more than :data:`MUCH`, and more than twice as much; else None."""
    targets: tuple[Reached, ...] = ()
    """Budgets and bounds that were asked for, and what was reached."""
    constraints: tuple[Constraint, ...] = ()
    """Constraints on widths, and what each is expected to cost; empty where no curve was needed."""


def choices_of(results: Sequence[PruneResult]) -> tuple[Choice, ...]:
    """Return the dense model and those of each budget, to compare."""
    found = [Choice("dense", results[0].dense, None)]
    for result in results:
        asked = next(target.asked for target in result.targets if target.name == "flops")
        found.append(Choice(asked, result.slim, result.divergence))
    return tuple(found)
