"""The page of a cut that was just made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from mhacut.checkpoint.load import LoadedModel
from mhacut.checkpoint.record import SlimRecord
from mhacut.inspection.compare import compare
from mhacut.inspection.layers import Evidence, inspect_model
from mhacut.inspection.summary import verdict
from mhacut.options.base import PathLike
from mhacut.options.inspect import INSPECTED_IMAGES
from mhacut.pruning.calibrate import calibrate
from mhacut.pruning.indicators import SearchStep
from mhacut.report.contents import Contents, stored_curves
from mhacut.report.page import write_page
from mhacut.surgery.find import find_prunable_layers


def write_report(
    path: PathLike,
    *,
    loaded: LoadedModel,
    dense: nn.Module,
    slim: nn.Module,
    record: SlimRecord,
    name: str,
    images: Tensor,
    data: str,
    steps: Sequence[SearchStep],
    figures: Sequence[tuple[str, str, str]],
    batch_size: int,
    overwrite: bool,
) -> Path:
    """Look at the slim model as ``mhacut inspect --compare --data-dir`` would, and write the page.

    Args:
        path: the page.
        loaded: what was read.
        dense: the model that was read, eval mode, without gradients.
        slim: what became of it, on the same device.
        record: what the slim file says of itself.
        name: of the slim file, for readers.
        images: of the search, normalised; the first of them are looked at.
        data: what they are, for readers.
        steps: of the search, where there was one.
        figures: what was measured: a name, before and after.
        batch_size: images at a time.
        overwrite: replace an existing page.

    Raises:
        OutputError: the page cannot be written.
    """
    seen = images[:INSPECTED_IMAGES]
    told = f"the first {len(seen)} of {data}" if len(seen) < len(images) else data
    calibration = calibrate(slim, find_prunable_layers(slim), seen, batch_size=batch_size)
    made = dataclasses.replace(loaded, model=slim, record=record, source=name)
    inspection = inspect_model(made, evidence=Evidence(calibration, told), ranked=lambda layer: True)
    comparison = compare(dense, slim, seen, source=loaded.source, data=told, batch_size=batch_size)
    curves, budget = stored_curves(record.history[-1:])
    contents = Contents(
        inspection,
        verdict(inspection),
        inspection.layers,
        comparison,
        curves,
        budget,
        tuple(steps),
        tuple(figures),
    )
    return write_page(path, contents, overwrite, loaded.path)
