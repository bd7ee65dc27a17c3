"""Begin, save and resume a run: its weights, its summary, and the state that it is resumed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from mhacut.checkpoint.record import SlimRecord
from mhacut.checkpoint.write import write_slim
from mhacut.errors import CheckpointError, DataError, option_name
from mhacut.finetuning.folder import ARGUMENTS, BEST, LAST, RunFolder, digest_of_options
from mhacut.finetuning.judge import choose_rate, measured_score
from mhacut.finetuning.result import Progress
from mhacut.finetuning.run import Run, record_of
from mhacut.measuring.accuracy import Evaluation, accuracy_for_history
from mhacut.options.finetune import FinetuneOptions
from mhacut.runtime.device import software_versions

_MAX_UNREADABLE = 0.1
"""Share of the images that may be unreadable before the run ends."""
_IMAGES_PER_STEP, _STEPS = "images per step", "steps"
# A slim file is passed on: it does not reveal where files lie on the machine that made it.
_LOCAL_OPTIONS = frozenset(
    {"checkpoint", "output", "overwrite", "resume", "teacher", "data_dir", "class_map", "workers", "log"}
)


def start(run: Run) -> None:
    """Make the directory of a new run and measure the slim file, or restore the state saved there.

    Every process must call this.
    """
    resuming, state = run.options.resume is not None, None
    with run.processes.fail_together():
        if run.processes.first:
            run.lock = run.folder.lock()
            if not resuming:
                run.folder.check_new(run.options)  # again, now that nobody else may write there
                if (old := run.folder.set_aside()) is not None:
                    run.reporter.log(f"the earlier run is now in {old}")
                run.folder.write_arguments(run.options)
        if resuming:  # every process reads the file: it is as large as three models, to send it takes longer
            state = run.folder.read_state()
            if state is not None:
                _restore(run, state)
                if run.processes.first:  # a run that was killed once its state was written has no summary
                    run.folder.write_summary(run.progress.summary())
    if state is not None:
        _log_restored(run)
        return
    if resuming:
        run.reporter.log(f"{run.folder.path}: no step was saved; starting from the first")
    if run.options.lr is None:
        run.options = replace(run.options, lr=choose_rate(run))
        run.trainer = run.new_trainer(run.options, total_steps=run.total_steps)
        with run.processes.fail_together():
            if run.processes.first:
                run.folder.write_arguments(run.options)
    # The weights that were read are a candidate too, so that the best file is never worse than they are.
    run.progress.start, run.progress.before = measured_score(run)
    run.progress.best = run.progress.start
    if run.progress.best is not None:
        with run.processes.fail_together():
            write_weights(run, BEST, run.progress.before)


def _restore(run: Run, state: Mapping[str, Any]) -> None:
    try:
        progress, began = Progress.from_state(state["progress"]), dict(state["began_with"])
        prolonged = progress.step == began[_STEPS] < run.total_steps
        if prolonged:
            progress.scheduled, began[_STEPS] = progress.step, run.total_steps
        _check_same(began, _inputs(run), run.folder)
        run.trainer.load_state_dict(state["trainer"])
        run.trainer.schedule_from(progress.scheduled, run.total_steps)
        run.progress = progress
        if prolonged and run.processes.first:  # so that it goes on to the new end wherever it is cut off
            run.folder.write_arguments(run.options)
    except CheckpointError:
        raise
    except Exception as error:  # each optimiser fails in its own way
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.100}"
        raise run.folder.not_resumable(f"does not fit this run ({reason})") from error


def _inputs(run: Run) -> dict[str, Any]:
    """Return digests and numbers that must be the same when the run is resumed."""
    return {
        "slim file": run.loaded.sha256,
        "teacher": run.teacher_sha256,
        "training images": run.images.fingerprint,
        "validation images": None if run.validation is None else run.validation.fingerprint,
        _IMAGES_PER_STEP: run.images_per_step,
        _STEPS: run.total_steps,
        f"options of {ARGUMENTS}": digest_of_options(run.options),
    }


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: RunFolder) -> None:
    """Raise a :class:`CheckpointError` that names the inputs that changed since the run began."""
    changed = {name: f"{before.get(name)!s:.12}, now {now[name]!s:.12}" for name in now}
    changed = {name: values for name, values in changed.items() if before.get(name) != now[name]}
    if changed:
        advice = (
            f"; start as many processes as before (torchrun --nproc-per-node N), or change "
            f"{option_name('batch_size')} or {option_name('grad_accum_steps')}"
        )
        raise CheckpointError(
            f"{folder.path}: the run cannot be resumed, because these differ from its start: "
            + "; ".join(f"{name} ({values})" for name, values in changed.items())
            + advice * (_IMAGES_PER_STEP in changed)
        )


def _log_restored(run: Run) -> None:
    if run.progress.best is not None and not run.processes.from_first(run.folder.file(BEST).exists):
        run.progress.best = None
        run.reporter.log(f"{run.folder.file(BEST)} is gone; the next epoch's weights take its place")
    done = run.progress.step >= run.total_steps
    run.reporter.log(
        f"all {run.total_steps} steps are done; there is nothing left to train"
        if done
        else f"continuing after step {run.progress.step} of {run.total_steps}"
        + f", the learning rate again from {run.options.lr:g}" * (run.progress.step == run.progress.scheduled)
    )


def save(run: Run, evaluation: Evaluation | None = None) -> None:
    """Write the last weights and the state for resuming. Every process must call this method."""
    parts = run.processes.gather(list(run.progress.unreadable))
    unreadable = list(dict.fromkeys(name for part in parts for name in part))
    run.progress.unreadable, run.progress.saved = dict.fromkeys(unreadable), run.progress.step
    with run.processes.fail_together():
        if len(unreadable) > _MAX_UNREADABLE * run.images.count:
            raise DataError(
                f"{len(unreadable)} of {run.images.count} images cannot be read, first {unreadable[0]}; "
                "repair or remove them"
            )
        write_weights(run, LAST, evaluation)
        if run.processes.first:
            # The state after the weights: a run that is killed between them repeats the steps since the
            # state before, with the same result.
            state = {"trainer": run.trainer.state_dict(), "progress": asdict(run.progress)}
            run.folder.write_state({"began_with": _inputs(run), **state})
            run.folder.write_summary(run.progress.summary())


def write_weights(run: Run, name: str, evaluation: Evaluation | None) -> None:
    """Write the run's weights, or their moving average if there is one, to a slim file.

    Only the first process writes.
    """
    if not run.processes.first:
        return
    dtypes = dict(run.loaded.dtypes)  # training is in float32, also of a file in half precision
    if run.options.dtype is not None:
        chosen = getattr(torch, run.options.dtype)
        dtypes = {key: chosen if dtype.is_floating_point else dtype for key, dtype in dtypes.items()}
    write_slim(
        run.folder.file(name),
        run.trainer.result,
        _record_after(run, evaluation),
        dtypes=dtypes,
        overwrite=True,
        input_path=run.loaded.path,
    )


def _record_after(run: Run, evaluation: Evaluation | None) -> SlimRecord:
    """Return the record of the slim file that was read, with one more entry in its history."""
    earlier = record_of(run.loaded)
    entry = {
        "command": "finetune",
        "options": portable(run.options),
        "seed": run.options.seed,
        "steps": run.progress.step,
        **({"prolonged_at": run.progress.scheduled} if run.progress.scheduled else {}),
        "images_per_step": run.images_per_step,
        "source_sha256": run.loaded.sha256,
        "teacher_sha256": run.teacher_sha256,
        "data": run.images.description,
        **run.provenance.to_history(),
        **accuracy_for_history(run.progress.before, evaluation),
        "versions": software_versions(),
    }
    return replace(earlier, preprocessing=run.preprocessing.to_json(), history=(*earlier.history, entry))


def portable(options: FinetuneOptions) -> dict[str, Any]:
    """Return ``options`` without those that depend on the machine."""
    return {key: value for key, value in options.values().items() if key not in _LOCAL_OPTIONS}
