"""Pages that ``mhacut prune --report`` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.provenance import Provenance
from mhacut.data import CalibrationImages
from mhacut.inspection.compare import compare
from mhacut.inspection.layers import Evidence, inspect_model
from mhacut.inspection.summary import summary
from mhacut.measuring.figures import ModelFigures
from mhacut.measuring.latency import latency_label
from mhacut.options.inspect import INSPECTED_IMAGES
from mhacut.options.prune import PruneOptions
from mhacut.pruning.calibrate import calibrate
from mhacut.pruning.indicators import SearchStep
from mhacut.report.contents import Contents
from mhacut.report.page import write_page
from mhacut.report.pareto import Choice
from mhacut.report.stored_curves import stored_curves
from mhacut.surgery.find import PrunableLayers


def write_report(
    options: PruneOptions,
    dense: Checkpoint,
    pruned: Checkpoint,
    layers: tuple[PrunableLayers, PrunableLayers],
    images: CalibrationImages,
    steps: Sequence[SearchStep],
    figures: Sequence[tuple[str, str, str]],
    provenance: Provenance,
) -> Path:
    """Inspect the pruned model as ``mhacut inspect --compare --data-dir`` does, and write the page.

    Args:
        options: options of the command; ``report`` is the page.
        dense: the checkpoint that was read, its model in eval mode, without gradients.
        pruned: the pruned model with its record, on the same device.
        layers: prunable layers of the dense and of the pruned model.
        images: images of the search; the first of them are used.
        steps: log of the search, where indicators were trained.
        figures: measurements: name, value before, value after.
        provenance: origins of the run's preprocessing.

    Raises:
        OutputError: the page cannot be written.
    """
    assert options.report is not None
    assert pruned.record is not None
    batch_size = options.search.batch_size
    used, data = images.images[:INSPECTED_IMAGES], images.description
    if len(used) < len(images.images):
        data = f"the first {len(used)} of {data}"
    calibration = calibrate(pruned.model, layers[1], used, batch_size=batch_size)
    evidence = Evidence(calibration, data)
    inspection = inspect_model(pruned, evidence=evidence, ranked=lambda layer: True, prunable=layers[1])
    comparison = compare(
        dense.model,
        pruned.model,
        used,
        source=dense.source,
        data=data,
        batch_size=batch_size,
        prunable=layers,
    )
    inspection = replace(inspection, provenance=provenance)
    contents = Contents(
        inspection,
        summary(inspection),
        inspection.layers,
        comparison,
        stored_curves(pruned.record.history[-1:]),
        tuple(steps),
        tuple(figures),
    )
    return write_page(options.report, contents, options.overwrite, dense.path)


def write_overview(
    options: PruneOptions,
    dense: Checkpoint,
    prunable: PrunableLayers,
    choices: Sequence[Choice],
    provenance: Provenance,
) -> Path:
    """Write the page about a run with several budgets.

    Args:
        options: options of the command; ``report`` is the page.
        dense: the checkpoint that was read.
        prunable: its prunable layers.
        choices: the dense model, then the model of each budget.
        provenance: origins of the run's preprocessing.

    Raises:
        OutputError: the page cannot be written.
    """
    assert options.report is not None
    inspection = inspect_model(
        dense, shapes_only=True, preprocessing=options.preprocessing, prunable=prunable
    )
    inspection = replace(inspection, provenance=provenance)
    contents = Contents(inspection, summary(inspection), inspection.layers, choices=tuple(choices))
    return write_page(options.report, contents, options.overwrite, dense.path)


def measured_figures(
    before: ModelFigures, after: ModelFigures, timing: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """Return the figures besides FLOPs and parameters, as name, value before and value after.

    Args:
        before: figures of the dense model.
        after: figures of the pruned model.
        timing: conditions that latency was measured under.
    """
    lines = []
    if before.evaluation is not None and after.evaluation is not None:
        name = before.evaluation.label
        lines.append((name, f"{before.evaluation.top1:.2f}", f"{after.evaluation.top1:.2f}"))
    if before.latency_ms is not None and after.latency_ms is not None:
        name = latency_label(timing)
        lines.append((name, f"{before.latency_ms:.2f}", f"{after.latency_ms:.2f}"))
    return lines
