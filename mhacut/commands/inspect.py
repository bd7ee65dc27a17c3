"""``mhacut inspect`` as a function: describe a checkpoint, and write a report."""

from __future__ import annotations

import fnmatch
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhacut.checkpoint.load import open_from_options
from mhacut.checkpoint.preprocessing import resolve_preprocessing
from mhacut.data import calibration_images
from mhacut.errors import UsageError, option_name
from mhacut.inspection.compare import Comparison, compare, read_dense
from mhacut.inspection.layers import Inspection, LayerReport, inspect_model, summary
from mhacut.options.base import DataOptions, PathLike
from mhacut.options.measure import InspectOptions, Sort
from mhacut.options.option import takes_keywords
from mhacut.pruning.calibrate import calibrate
from mhacut.report.history import stored_curves
from mhacut.report.page import write_page
from mhacut.report.sections import Contents
from mhacut.runtime.device import default_torch, resolve_device
from mhacut.runtime.files import check_outputs
from mhacut.runtime.progress import Reporter, Reporting, reporting
from mhacut.surgery.find import find_prunable_layers

_MAX_NAMES = 8


@dataclass(frozen=True)
class InspectResult:
    inspection: Inspection
    verdict: str
    """Summary of the inspection in 1 line."""
    chosen: tuple[LayerReport, ...]
    """Layers that match ``layer``, in the order of ``sort``."""
    comparison: Comparison | None = None
    """Comparison with the dense model of ``compare``. None without ``compare``."""
    written: tuple[Path, ...] = ()
    """Files of the HTML report."""


@dataclass(frozen=True)
class _InspectCall(Reporting, InspectOptions):
    checkpoint: PathLike


@default_torch()
@takes_keywords(_InspectCall)
def inspect(
    checkpoint: PathLike,
    *,
    progress: bool | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> InspectResult:
    """Describe the layers of ``checkpoint``: cost, similarity of channels, and number of useful channels.

    Args:
        checkpoint: ``.safetensors``, ``.pth``, a timm folder, a slim file, or ``timm:NAME``.
        progress: show a progress bar. Default: in notebooks and terminals.
        reporter: receives progress and messages instead of a bar.
        options: options of the command line, listed below by ``help()``.

    Raises:
        MhacutError: a subclass in :mod:`mhacut.errors`.
    """
    with reporting(reporter, progress) as shown:
        return run_inspect(InspectOptions.of(checkpoint=checkpoint, **options), shown)


def run_inspect(options: InspectOptions, reporter: Reporter) -> InspectResult:
    check_outputs((options.html,), overwrite=options.overwrite, input_paths=options.files_read())
    for note in options.unmet_needs().values():
        reporter.log(note)
    reporter.start("reading")
    # Weights are needed only to run the model.
    opened = open_from_options(options, reporter, weights=options.sees_images)
    names = [layer.name for layer in find_prunable_layers(opened.skeleton).layers]
    wanted = _wanted(names, options.layer)
    evidence = comparison = None
    if options.sees_images:
        opened.model.requires_grad_(False).to(resolve_device(options.device))
        source = DataOptions(
            data_dir=options.data_dir, dataset=options.dataset, train_split=options.train_split
        )
        found = calibration_images(
            resolve_preprocessing(opened, options),
            source,
            count=options.calibration_images,
            seed=options.seed,
            use_labels=False,
        )
        images, size = found.images, options.batch_size
        if options.has_images:
            reporter.start("calibrating")
            prunable = find_prunable_layers(opened.model)
            calibration = calibrate(opened.model, prunable, images, batch_size=size, reporter=reporter)
            evidence = calibration, found.description
        if options.compare is not None:
            reporter.start("reading")
            dense = read_dense(options.compare, opened, reporter, options.part)
            reporter.start("comparing")
            comparison = compare(
                dense.model.requires_grad_(False).to(resolve_device(options.device)),
                opened.model,
                images,
                source=dense.source,
                data=found.description,
                batch_size=size,
                progress=reporter.advance,
            )
    reporter.start("looking at heads")
    inspection = inspect_model(
        opened,
        shapes_only=options.shapes,
        evidence=evidence,
        preprocessing=options,
        progress=reporter.advance,
    )
    chosen = [layer for layer in inspection.layers if layer.name in wanted]
    chosen.sort(key=lambda layer: _sort_value(layer, options.sort), reverse=True)
    line = summary(inspection)
    contents = Contents(inspection, tuple(chosen), comparison, stored_curves(inspection.history))
    written: tuple[Path, ...] = ()
    if options.html is not None:
        written = (write_page(options.html, contents, options.overwrite, opened.path),)
    return InspectResult(inspection, line, tuple(chosen), comparison, written)


def _wanted(names: list[str], pattern: str | None) -> list[str]:
    if pattern is None:
        return names
    wanted = fnmatch.filter(names, pattern)
    if not wanted:
        names_shown = ", ".join(names[:_MAX_NAMES]) + (", ..." if len(names) > _MAX_NAMES else "")
        raise UsageError(
            f"{option_name('layer', pattern)}: no layer has this name. The model has {names_shown}. Quote "
            "patterns: 'blocks.1*.attn'"
        )
    return wanted


def _sort_value(layer: LayerReport, sort: Sort) -> float:
    if sort in ("qk", "v"):
        return next((float(unit.now) for kind, unit in layer.units.items() if kind == sort), -1.0)
    if sort in ("similarity", "rank"):
        heads = [head for unit in layer.units.values() for head in unit.heads]
        values = [head.similarity if sort == "similarity" else head.rank99 for head in heads]
        return statistics.mean(values) if values else -1.0
    return {"flops": layer.flops, "params": layer.parameters}.get(sort, 0)
