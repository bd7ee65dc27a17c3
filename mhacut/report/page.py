"""The report as a self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

from mhacut._version import __version__
from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.preprocessing import Provenance
from mhacut.data import CalibrationImages
from mhacut.inspection.compare import compare
from mhacut.inspection.layers import about_sizes, about_tokens, inspect_model, summary
from mhacut.measuring.accuracy import Figure
from mhacut.options.base import PathLike
from mhacut.options.measure import INSPECTED_IMAGES
from mhacut.options.prune import PruneOptions
from mhacut.pruning.calibrate import calibrate
from mhacut.report.choices import Choice
from mhacut.report.gallery import gallery
from mhacut.report.history import step, stored_curves
from mhacut.report.sections import Contents, sections
from mhacut.runtime.files import write_file
from mhacut.surgery.find import PrunableLayers
from mhacut.text import safe

PICTURES = 4
"""Number of images in a report for which merged tokens are drawn."""


def write_page(
    path: PathLike, contents: Contents, overwrite: bool, input_path: str | os.PathLike[str] | None
) -> Path:
    write_file(path, page(contents).encode(), overwrite=overwrite, input_path=input_path)
    return Path(path)


def write_report(
    options: PruneOptions,
    dense: Checkpoint,
    pruned: Checkpoint,
    layers: tuple[PrunableLayers, PrunableLayers],
    images: CalibrationImages,
    figures: Sequence[Figure],
    provenance: Provenance,
    verdict: Sequence[str],
) -> Path:
    """Compare the pruned with the dense model as ``mhacut inspect --compare`` does, and write the page."""
    assert options.report is not None
    assert pruned.record is not None
    batch_size = options.batch_size
    # A few, as in inspect: the search may have used thousands of images.
    used, data = images.images[:INSPECTED_IMAGES], images.description
    if len(used) < len(images.images):
        data = f"the first {len(used)} of {data}"
    calibration = calibrate(pruned.model, layers[1], used, batch_size=batch_size)
    inspection = inspect_model(pruned, evidence=(calibration, data), prunable=layers[1])
    comparison = compare(
        dense.model,
        pruned.model,
        used,
        source=dense.source,
        data=data,
        batch_size=batch_size,
        prunable=layers,
    )
    pictures: list[str] = []
    if any(inspection.tokens.merged) and used.shape[1] == 3:
        names = pruned.identity.pretrained_cfg.get("label_names", ())
        pictures = gallery(dense.model, pruned.model, used[:PICTURES], inspection.preprocessing, names)
    # Only the run knows the origin of the preprocessing. The slim file has only its values.
    inspection = replace(inspection, provenance=provenance)
    # Only the last entry: an earlier cut's curves do not describe this cut.
    curves = stored_curves(pruned.record.history[-1:])
    contents = Contents(
        inspection,
        inspection.layers,
        comparison,
        curves,
        figures,
        pictures=tuple(pictures),
        verdict=tuple(verdict),
    )
    return write_page(options.report, contents, options.overwrite, dense.path)


def write_overview(
    options: PruneOptions,
    dense: Checkpoint,
    prunable: PrunableLayers,
    choices: Sequence[Choice],
    provenance: Provenance,
    verdict: Sequence[str],
) -> Path:
    """Write the page that compares the pruned models of several budgets."""
    assert options.report is not None
    inspection = inspect_model(dense, shapes_only=True, preprocessing=options, prunable=prunable)
    inspection = replace(inspection, provenance=provenance)
    contents = Contents(inspection, inspection.layers, choices=choices, verdict=tuple(verdict))
    return write_page(options.report, contents, options.overwrite, dense.path)


def page(contents: Contents) -> str:
    from markupsafe import Markup

    inspection = contents.inspection
    about_model = about_tokens(inspection.tokens) if contents.comparison else [summary(inspection)]
    style = files("mhacut.report").joinpath("page.css").read_text(encoding="utf-8")
    # Allows only this style sheet, by its hash: text from files cannot run even if it is not escaped.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:"
    return str(
        _template().render(
            policy=policy,
            style=Markup(style),  # not escaped: part of mhacut
            inspection=inspection,
            summary="; ".join((*about_model, *about_sizes(inspection))),
            date=date.today().isoformat(),
            verdict=contents.verdict,
            version=__version__,
            sections=sections(contents),
            steps=[step(entry) for entry in contents.inspection.history],
        )
    )


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mhacut", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html")


def _shown(value: Any) -> Any:
    if hasattr(value, "__html__"):
        return value
    return safe(value) if isinstance(value, str) else value
