"""Files that ``mhacut prune`` writes: their names, and whether they may be written. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from mhacut.errors import UsageError, option_name
from mhacut.options.base import IN_MEMORY, PathLike
from mhacut.options.prune import PruneOptions
from mhacut.runtime.files import check_outputs, stem_of

PLACE = "{}"
"""Placeholder in ``--output`` that becomes the budget, such as ``50pct``."""


def options_of_each(options: PruneOptions, stem: str) -> tuple[PruneOptions, ...]:
    ending = ".safetensors" if options.as_ == "timm" else ""
    output, page = str(options.output or f"{stem}-{PLACE}{ending}"), options.report
    if options.several and PLACE not in Path(output).name:
        raise UsageError(
            f"{option_name('output', output)}: expected {PLACE} in the name, as a placeholder for the budget "
            f"of each of the {len(options.several)} files: vit-{PLACE}.safetensors"
        )
    files = []
    for flops in options.several or (options.flops,):
        alone = replace(options, flops=flops)
        # 50pct, 50pct-params60pct, kl0.1
        labels = [budget.label for budget in alone.budgets.values()]
        bounds = (("kl", alone.max_kl), ("drop", alone.max_drop))
        label = "-".join(labels + [f"{bound}{value:g}" for bound, value in bounds if value is not None])
        name, own_page = Path(output).name.replace(PLACE, label), page
        if options.several and page is not None:
            own_page = Path(page).with_name(f"{Path(page).stem}-{label}{Path(page).suffix}")
        files.append(replace(alone, output=str(Path(output).with_name(name)), report=own_page))
    return tuple(files)


def check_output_paths(options: PruneOptions, stem: str | None = None, read: PathLike | None = None) -> None:
    if options.as_ == "huggingface":
        return  # its folder is checked once torch is imported
    each = options_of_each(options, stem or stem_of(Path(options.checkpoint)))
    if stem is None and options.output is None and not os.path.isfile(options.checkpoint):
        each = ()  # default names of what is no file are not known yet
    checkpoint = read or (None if options.checkpoint == IN_MEMORY else options.checkpoint)
    pages = {os.fspath(one.report) for one in (options, *each) if one.report is not None}
    written = [*sorted(pages), *(None if one.dry_run else one.output for one in each)]
    sources = (checkpoint, *options.files_read())
    check_outputs(written, overwrite=options.overwrite, input_paths=sources)
