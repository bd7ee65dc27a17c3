"""Files that a run writes as it goes: weights, summary, and the state that it can be resumed from."""

from __future__ import annotations

from dataclasses import replace

import torch

from mhacut.checkpoint.write import write_slim
from mhacut.errors import DataError, OutputError
from mhacut.finetuning.folder import BEST, LAST
from mhacut.finetuning.history import record_after
from mhacut.finetuning.logs import Logs
from mhacut.finetuning.result import EpochSummary
from mhacut.finetuning.run import Run
from mhacut.measuring.accuracy import Evaluation
from mhacut.runtime.process import StopRequest

_MOST_UNREADABLE = 0.1
"""Share of the images that may be unreadable before the run ends."""
_MOST_LISTED = 50_000
"""Number of them above which it ends in any case: the saved state lists them, and its size is bounded."""
_NAMED = 10
"""Number of unreadable images that are logged by name; the result counts and lists all."""


def end_epoch(run: Run, logs: Logs, request: StopRequest) -> None:
    """Measure, write the best and the last weights, and add a line to the summary.

    Every process must call this.

    Args:
        run: the run.
        logs: logs that receive the line.
        request: a request to stop, which is acknowledged during the measurement.

    Raises:
        DataError: too many images cannot be read.
        OutputError: a file cannot be written.
    """
    progress, evaluation = run.progress, None
    if run.validation is not None:
        run.reporter.start("evaluating")
        evaluation = run.measure(run.trainer.result, request)
    row = EpochSummary(
        epoch=len(progress.rows),
        train_loss=progress.epoch_loss / progress.epoch_images,
        eval_loss=None if evaluation is None else evaluation.loss,
        eval_top1=None if evaluation is None else evaluation.top1,
        eval_top5=None if evaluation is None else evaluation.top5,
        lr=run.trainer.lr,
    )
    progress.rows.append(row)
    progress.epoch_loss, progress.epoch_images = 0.0, 0
    measured = "" if evaluation is None else f", top-1 {evaluation.top1:.2f}%"
    run.reporter.log(f"epoch {row.epoch + 1}: loss {row.train_loss:.4f}{measured}")
    if evaluation is not None and (progress.best is None or evaluation.top1 > progress.best):
        progress.best = evaluation.top1
        with run.processes.together():
            write_weights(run, BEST, evaluation)
    save(run, evaluation)
    logs.write(progress.summary())


def save(run: Run, evaluation: Evaluation | None = None) -> None:
    """Write the last weights, and the state that the run can be resumed from; every process must call this.

    Args:
        run: the run.
        evaluation: accuracy of its weights, where it was just measured.

    Raises:
        DataError: too many images cannot be read.
        OutputError: a file cannot be written; the files of the previous save stay whole, and before the
            first save an earlier run's.
    """
    _share_unreadable(run)
    with run.processes.together():
        _write_last(run, evaluation)
    run.progress.saved, run.replaces = run.progress.step, False


def _share_unreadable(run: Run) -> None:
    """Collect the unreadable images of all processes; the first process logs those that are new to it."""
    own = run.progress.unreadable
    run.progress.unreadable = dict.fromkeys(run.processes.union(list(own)))
    for file in run.progress.unreadable:
        if file not in own:
            log_unreadable(run, file)


def log_unreadable(run: Run, image: str) -> None:
    """Log one of the first unreadable images that this process finds, and that there are more.

    Args:
        run: the run.
        image: its file, and the reason if that is known.
    """
    run.unreadable_found += 1
    if run.unreadable_found <= _NAMED:
        run.reporter.log(f"unreadable, replaced by another image: {image}")
    elif run.unreadable_found == _NAMED + 1:
        run.reporter.log("more images are unreadable; they are counted at the end")


def _write_last(run: Run, evaluation: Evaluation | None) -> None:
    unreadable = run.progress.unreadable
    if len(unreadable) > min(_MOST_UNREADABLE * run.images.count, _MOST_LISTED):
        raise DataError(
            f"{len(unreadable)} of {run.images.count} images cannot be read, first "
            f"{next(iter(unreadable))}; repair or remove them"
        )
    write_weights(run, LAST, evaluation)
    if run.processes.first:
        state = {"began_with": run.inputs(), "trainer": run.trainer.state(), **run.progress.to_state()}
        with run.folder.saying_what_stays():
            run.folder.write_summary(run.progress.summary())
            run.folder.write_state(state)
        run.folder = run.folder.replace_held()


def write_weights(run: Run, name: str, evaluation: Evaluation | None) -> None:
    """Write the run's weights, or their moving average if there is one, to a slim file.

    Only the first process writes.

    Args:
        run: the run.
        name: name of the file in the run's directory.
        evaluation: accuracy of the weights; None if it was not measured.

    Raises:
        OutputError: the file cannot be written, or the run's directory was removed or replaced.
    """
    if not run.processes.first:
        return
    there = run.folder.still_there(run.lock)
    if not there:
        run.folder = replace(run.folder, hidden=None)  # the earlier run is gone, too
    dtypes = dict(run.loaded.dtypes)
    if run.options.dtype is not None:
        chosen = getattr(torch, run.options.dtype)
        dtypes = {key: chosen if dtype.is_floating_point else dtype for key, dtype in dtypes.items()}
    record = record_after(
        run.loaded,
        run.options,
        run.preprocessing,
        run.provenance,
        (run.progress.before, evaluation),
        steps=run.progress.step,
        images_per_step=run.images_per_step,
        teacher_sha256=run.teacher_sha256,
        data=run.images.description,
    )
    try:
        with run.folder.saying_what_stays():
            write_slim(
                run.folder.file(name),
                run.trainer.result,
                record,
                dtypes=dtypes,
                overwrite=True,
                input_path=run.loaded.path,
            )
    except OutputError as error:
        raise OutputError(f"after step {run.progress.step}: {error}") from error
    if not there:
        raise OutputError(
            f"{run.folder.path}: was removed meanwhile, and what the run is resumed from with it; {name} "
            "there holds its weights"
        )
