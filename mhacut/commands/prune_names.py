"""Files that ``mhacut prune`` writes: their names, and whether they may be written. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mhacut.budget import Targets
from mhacut.errors import UsageError, option_name
from mhacut.options.base import IN_MEMORY, PathLike
from mhacut.options.prune import PruneOptions
from mhacut.runtime.files import check_output, check_outputs, stem_of

PLACE = "{}"
"""Placeholder in an output's name for the budget of each of several files."""


def parse_targets(options: PruneOptions) -> tuple[Targets, ...]:
    """Return the targets of each file to write.

    Raises:
        UsageError: a budget cannot be understood.
    """
    return tuple(
        Targets.parse(flops, options.params, options.size, options.max_latency)
        for flops in options.flops_of_each
    )


def options_of_each(options: PruneOptions, stem: str) -> tuple[PruneOptions, ...]:
    """Return the options with which each file would be written alone, its name among them.

    Args:
        options: of the command, with one budget or several.
        stem: of default names.

    Raises:
        UsageError: several files are to have one name, or a budget cannot be understood.
    """
    labels = [_label(options, targets) for targets in parse_targets(options)]
    output = str(options.output or f"{stem}-{PLACE}.safetensors")
    if not options.several:
        name = Path(output).name.replace(PLACE, labels[0])
        return (replace(options, output=str(Path(output).with_name(name))),)
    if PLACE not in Path(output).name:
        raise UsageError(
            f"{option_name('output', output)}: expected {PLACE} in the name, as a placeholder for the budget "
            f"of each of the {len(labels)} files: vit-{PLACE}.safetensors"
        )
    found = []
    for label, flops in zip(labels, options.several, strict=True):
        page = options.report
        if page is not None:
            page = Path(page).with_name(f"{Path(page).stem}-{label}{Path(page).suffix}")
        found.append(replace(options, flops=flops, output=output.replace(PLACE, label), report=page))
    return tuple(found)


def check_files(options: PruneOptions, each: Sequence[PruneOptions], read: PathLike | None = None) -> None:
    """Raise an :class:`OutputError` if a file that the command writes must not or cannot be written.

    Args:
        options: of the command; they name the page about several files.
        each: of each file, as :func:`options_of_each` returns them.
        read: file that the checkpoint was found in; None before it is read.
    """
    named = None if options.checkpoint == IN_MEMORY else options.checkpoint
    kept = options.calibration
    if kept is not None and not os.path.exists(kept):  # else it is read
        check_output(kept, overwrite=False, input_path=read or named)
    pages = {os.fspath(own.report) for own in (options, *each) if own.report is not None}
    written = [*sorted(pages), *(None if own.dry_run else own.output for own in each)]
    sources = (read or named, kept, *options.files_read())
    check_outputs(written, overwrite=options.overwrite, input_paths=sources)


def check_files_before_reading(options: PruneOptions) -> None:
    """Check the files to write as far as their names are known before the checkpoint is read.

    Raises:
        UsageError: a budget cannot be understood, or several files are to have one name.
        OutputError: a file must not or cannot be written.
    """
    parse_targets(options)
    stem_is_known = options.output is not None or os.path.isfile(options.checkpoint)
    stem = stem_of(Path(options.checkpoint))
    check_files(options, options_of_each(options, stem) if stem_is_known else (options,))


def _label(options: PruneOptions, targets: Targets) -> str:
    bounds = (("kl", options.max_kl), ("drop", options.max_drop))
    return "-".join(
        [budget.label for budget in targets.budgets]
        + [f"{name}{bound:g}" for name, bound in bounds if bound is not None]
    )
