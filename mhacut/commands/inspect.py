"""``mhacut inspect`` as a function: open a checkpoint, look at its heads, say what it found."""

from __future__ import annotations

import fnmatch
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhacut.checkpoint.load import (
    TIMM_PREFIX,
    LoadedModel,
    Outline,
    read_as_told,
    read_header,
    read_model,
    read_outline,
)
from mhacut.checkpoint.preprocessing import resolve_preprocessing
from mhacut.data import CalibrationImages, calibration_images
from mhacut.errors import UsageError
from mhacut.inspection.compare import Comparison, compare
from mhacut.inspection.layers import Evidence, Inspection, LayerReport, inspect_model
from mhacut.inspection.summary import verdict
from mhacut.options.base import PathLike
from mhacut.options.inspect import InspectOptions
from mhacut.pruning.calibrate import calibrate
from mhacut.report.contents import Contents, stored_curves
from mhacut.report.page import write_page
from mhacut.report.picture import write_picture
from mhacut.runtime.device import resolve_device
from mhacut.runtime.extras import need
from mhacut.runtime.files import check_output
from mhacut.runtime.progress import Reporter, Silent
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.info import model_input_size

_TOLD = 8


@dataclass(frozen=True)
class InspectResult:
    """What :func:`inspect` found."""

    inspection: Inspection
    """Of the whole model."""
    verdict: str
    """In one line."""
    chosen: tuple[LayerReport, ...]
    """Of the layers those that were asked for, in the order asked for."""
    comparison: Comparison | None = None
    """With a dense model, where one was given."""
    written: tuple[Path, ...] = ()
    """Files that the report was written to."""


def inspect(checkpoint: PathLike, *, reporter: Reporter | None = None, **options: Any) -> InspectResult:
    """Look at every head of ``checkpoint``: what it costs, how alike its channels are, how many it uses.

    Args:
        checkpoint: ``.safetensors``, ``.pth``, a timm folder, a slim file, or ``timm:NAME``.
        reporter: told what happens; silent by default.
        options: the names of the command line's flags, see :class:`mhacut.options.inspect.InspectOptions`:
            ``data_dir``, ``layer``, ``heads``, ``model``, ``model_args``, ...

    Raises:
        MhacutError: and its kinds, in :mod:`mhacut.errors`.
    """
    return run_inspect(InspectOptions.from_flat(checkpoint=checkpoint, **options), reporter or Silent())


def run_inspect(options: InspectOptions, reporter: Reporter) -> InspectResult:
    """:func:`inspect` with its options in one object."""
    if options.png is not None:
        need("--png", "matplotlib", "plot")
    for path in (options.html, options.png):
        if path is not None:
            check_output(path, overwrite=options.overwrite, input_path=options.checkpoint)
    reporter.start("reading")
    opened = _open(options, reporter)
    names = [layer.name for layer in find_prunable_layers(opened.model).layers]
    wanted = _wanted(names, options.layer)
    evidence = comparison = None
    if isinstance(opened, LoadedModel) and options.sees_images:
        seen = _images(options, opened)
        if options.data_dir is not None or options.dataset is not None:
            reporter.start("looking at images")
            evidence = _look(opened, seen, options, reporter)
        if options.compare is not None:
            comparison = _compared(opened, seen, options, reporter)
    reporter.start("looking at heads")
    detailed = options.heads or options.layer is not None or options.html is not None
    in_detail = set(wanted) if detailed else set()
    inspection = inspect_model(
        opened,
        shapes_only=options.shapes,
        evidence=evidence,
        ranked=in_detail.__contains__,
        preprocessing=options.preprocessing,
        progress=lambda done, total: reporter.advance(done, total),
    )
    chosen = [layer for layer in inspection.layers if layer.name in wanted]
    chosen.sort(key=_order(options.sort))
    told = verdict(inspection)
    curves, budget = stored_curves(inspection.history)
    contents = Contents(inspection, told, tuple(chosen), comparison, curves, budget)
    written = tuple(
        write(path, contents, options.overwrite, opened.path)
        for path, write in ((options.html, write_page), (options.png, write_picture))
        if path is not None
    )
    return InspectResult(inspection, told, tuple(chosen), comparison, written)


def _open(options: InspectOptions, reporter: Reporter) -> LoadedModel | Outline:
    """The checkpoint, its weights read only where the model is going to be run."""
    named = str(options.checkpoint).startswith(TIMM_PREFIX)
    if named or options.sees_images:
        return read_as_told(options, reporter)
    outline = read_outline(
        options.checkpoint,
        model=options.model,
        model_args=options.model_args or None,
        num_classes=options.num_classes,
    )
    for note in outline.notes:
        reporter.log(note)
    return outline


def _wanted(names: list[str], pattern: str | None) -> list[str]:
    if pattern is None:
        return names
    wanted = fnmatch.filter(names, pattern)
    if not wanted:
        shown = ", ".join(names[:_TOLD]) + (", ..." if len(names) > _TOLD else "")
        raise UsageError(
            f"--layer {pattern}: no layer of that name; there are {shown} (quote patterns: 'blocks.1*.attn')"
        )
    return wanted


def _images(options: InspectOptions, opened: LoadedModel) -> CalibrationImages:
    return calibration_images(
        resolve_preprocessing(opened, options.preprocessing),
        count=options.images_wanted,
        seed=options.seed,
        data_dir=None if options.data_dir is None else Path(options.data_dir),
        dataset=options.dataset,
        split=options.train_split,
        use_labels=False,
    )


def _look(
    opened: LoadedModel, seen: CalibrationImages, options: InspectOptions, reporter: Reporter
) -> Evidence:
    device = resolve_device(options.device)
    model = opened.model.requires_grad_(False).to(device)
    calibration = calibrate(
        model,
        find_prunable_layers(model),
        seen.images,
        batch_size=options.batch_size,
        progress=lambda done, total: reporter.advance(done, total),
    )
    return Evidence(calibration, seen.description)


def _compared(
    opened: LoadedModel, seen: CalibrationImages, options: InspectOptions, reporter: Reporter
) -> Comparison:
    """With the checkpoint of ``--compare``, which is of the same architecture, whether it says so or not."""
    assert options.compare is not None
    reporter.start("reading the dense model")
    says_what_it_is = os.fspath(options.compare).startswith(TIMM_PREFIX)
    if not says_what_it_is:
        header = read_header(options.compare)
        says_what_it_is = header.record is not None or header.file.config is not None
    identity = opened.identity
    args = {name: value for name, value in identity.model_args.items() if name != "num_classes"}
    stated: dict[str, Any] = {} if says_what_it_is else {"model": identity.architecture, "model_args": args}
    dense = read_model(options.compare, **stated)
    if dense.identity.architecture != identity.architecture:
        raise UsageError(
            f"--compare {dense.source}: expected the checkpoint's architecture, {identity.architecture}, "
            f"found {dense.identity.architecture}; give the dense model that it was made from"
        )
    if opened.record is None and dense.record is not None:
        raise UsageError(
            f"--compare {dense.source}: is a slim file and {opened.source} is dense; give the slim one first"
        )
    history = () if opened.record is None else opened.record.history
    if dense.sha256 not in {entry.get("source_sha256") for entry in history}:
        reporter.log(f"{dense.source} is not the file that {opened.source} was cut from")
    sizes = [model_input_size(one.model, one.identity.pretrained_cfg) for one in (dense, opened)]
    if sizes[0] != sizes[1]:
        told = ["x".join(map(str, size)) for size in sizes]
        raise UsageError(
            f"--compare {dense.source}: takes images of {told[0]}, the checkpoint of {told[1]}; give the "
            "dense model that it was made from"
        )
    device = resolve_device(options.device)
    reporter.start("comparing")
    return compare(
        dense.model.requires_grad_(False).to(device),
        opened.model.requires_grad_(False).to(device),
        seen.images,
        source=dense.source,
        data=seen.description,
        batch_size=options.batch_size,
        progress=lambda done, total: reporter.advance(done, total),
    )


def _order(sort: str) -> Any:
    """A key that puts the largest first; layers that have no such number come last, in the model's order."""

    def key(layer: LayerReport) -> float:
        if sort == "layer":
            return 0.0
        if sort in ("flops", "params"):
            return -float(layer.flops if sort == "flops" else layer.parameters)
        if sort in ("qk", "v"):
            return -float(sum(unit.now for kind, unit in layer.units.items() if kind == sort)) or 1.0
        values = [
            head.similarity if sort == "similarity" else head.rank99
            for unit in layer.units.values()
            for head in unit.heads
        ]
        return -sum(values) / len(values) if values else 1.0

    return key
