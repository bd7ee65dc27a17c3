"""Start of a run: in a new directory, or from the state that an interrupted run saved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.errors import CheckpointError, option_name
from mhacut.finetuning.folder import BEST
from mhacut.finetuning.history import record_of
from mhacut.finetuning.progress import Progress
from mhacut.finetuning.run import Run
from mhacut.finetuning.saved_state import read_saved, unfit
from mhacut.finetuning.saving import write_weights
from mhacut.measuring.accuracy import Evaluation
from mhacut.runtime.files import REMOTE

_PATHS = ("checkpoint", "teacher", "data_dir", "class_map", "output")
"""Options that are paths, or begin with one of :data:`REMOTE`."""


def start(run: Run) -> None:
    """Make the directory of ``run``, or restore the state saved there; without one, measure accuracy first.

    A run that is already in the directory of a new one stays until the first :func:`saving.save`.
    Every process must call this.

    Raises:
        OutputError: the directory holds a run, another process writes one there, or it cannot be written.
        CheckpointError: the saved state is damaged, gone or another run's, or the run now has other inputs.
    """
    saved = None
    with run.processes.together():
        if run.options.resume is not None:
            saved = _saved_state(run)
        elif run.processes.first:
            _make_directory(run)
    if saved is not None:
        progress, state = saved
        if progress.best is not None and progress.before is not None:
            _restore_best(run, progress, progress.before)
        run.trainer.restore_weights(state)
        run.progress = progress
        done = run.progress.step >= run.total_steps
        run.reporter.log(
            f"all {run.total_steps} steps are done; there is nothing left to train"
            if done
            else f"continuing after step {run.progress.step} of {run.total_steps}"
        )
        return
    if run.options.resume is not None:
        run.reporter.log(f"{run.folder.path}: no step was saved; starting from the first")
    else:
        run.replaces = run.processes.from_first(lambda: run.folder.hidden is not None)
    if run.validation is not None:
        run.reporter.start("evaluating")
        run.progress.before = run.measure(run.trainer.result)
        # The weights that were read are a candidate too, so that the best file is never worse than they are.
        run.progress.best = run.progress.before.top1
        with run.processes.together():
            write_weights(run, BEST, run.progress.before)


def _restore_best(run: Run, progress: Progress, before: Evaluation) -> None:
    """Put the weights that training began with in the place of the best ones, if these were removed.

    Raises:
        CheckpointError: the best ones are damaged, or another run's.
    """
    best = run.folder.file(BEST)
    if run.processes.from_first(best.exists):
        with run.processes.together():
            _check_best(run, best)
        return
    run.reporter.log(f"{run.folder.file(BEST)} is gone; the weights that training began with take its place")
    progress.best, run.progress.before = before.top1, before
    with run.processes.together():
        write_weights(run, BEST, before)


def _check_best(run: Run, best: Path) -> None:
    if not run.processes.first:
        return
    resume = option_name("resume", run.folder.path)
    advice = f"move it away, and {resume} puts those there that training began with"
    try:
        record = Checkpoint.open(best).record
    except CheckpointError as error:
        raise CheckpointError(f"{error}; the run's best weights: {advice}") from None
    source = None if record is None or not record.history else record.history[-1].get("source_sha256")
    if record is None or record.plan != record_of(run.loaded).plan or source != run.loaded.sha256:
        raise CheckpointError(f"{best}: holds other weights than this run's best ones; {advice}")


def _saved_state(run: Run) -> tuple[Progress, Mapping[str, Any]] | None:
    """Return the saved progress, and the state of the trainer; restore all of that but the weights."""
    if run.processes.first:
        run.lock = run.folder.claim()
        run.folder.check_files()
        run.folder.sweep()
    steps = run.total_steps, run.batches.steps_per_epoch
    saved = read_saved(run.folder, run.trainer, run.inputs(), steps)
    if saved is not None:
        run.trainer.restore_optimizer(saved[1], partial(unfit, run.folder))
    return saved


def _make_directory(run: Run) -> None:
    run.folder.check_new(run.options.files_read(), overwrite=run.options.overwrite)
    run.lock = run.folder.open_new(overwrite=run.options.overwrite)
    if run.folder.held():
        run.folder = run.folder.beside_held(run.hidden)
    with run.folder.saying_what_stays():
        run.folder.write_arguments(_with_absolute_paths({**run.options.flat(), "overwrite": False}))


def _with_absolute_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return options whose paths hold from any working directory."""
    paths = {
        name: os.path.abspath(values[name])
        for name in _PATHS
        if values[name] is not None and not values[name].startswith(REMOTE)
    }
    return {**values, **paths}
