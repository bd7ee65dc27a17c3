"""The page of a cut that was just made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.record import SlimRecord
from mhacut.inspection.compare import compare
from mhacut.inspection.layers import Evidence, inspect_model
from mhacut.inspection.summary import summary
from mhacut.options.base import PathLike
from mhacut.options.inspect import INSPECTED_IMAGES
from mhacut.pruning.calibrate import calibrate
from mhacut.pruning.indicators import SearchStep
from mhacut.report.contents import Contents
from mhacut.report.page import write_page
from mhacut.report.stored_curves import stored_curves
from mhacut.surgery.find import find_prunable_layers


def write_report(
    path: PathLike,
    *,
    loaded: Checkpoint,
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
    """Look at the pruned model as ``mhacut inspect --compare --data-dir`` would, and write the page.

    Args:
        path: the page.
        loaded: the checkpoint that was read.
        dense: its model, eval mode, without gradients.
        slim: the pruned model, on the same device.
        record: description that the slim file carries.
        name: name of the slim file, for readers.
        images: images of the search, [n, C, H, W], normalised; the first of them are used.
        data: description of the images, for readers.
        steps: log of the search, where indicators were trained.
        figures: measurements: name, value before, value after.
        batch_size: images at a time.
        overwrite: replace an existing page.

    Raises:
        OutputError: the page cannot be written.
    """
    used = images[:INSPECTED_IMAGES]
    if len(used) < len(images):
        data = f"the first {len(used)} of {data}"
    calibration = calibrate(slim, find_prunable_layers(slim), used, batch_size=batch_size)
    pruned = Checkpoint.of_model(slim, loaded.identity, source=name, record=record, dtypes=loaded.dtypes)
    inspection = inspect_model(pruned, evidence=Evidence(calibration, data), ranked=lambda layer: True)
    curves, budget = stored_curves(record.history[-1:])
    contents = Contents(
        inspection,
        summary(inspection),
        inspection.layers,
        compare(dense, slim, used, source=loaded.source, data=data, batch_size=batch_size),
        curves,
        budget,
        tuple(steps),
        tuple(figures),
    )
    return write_page(path, contents, overwrite, loaded.path)
