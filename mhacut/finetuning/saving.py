"""Start, save and resume a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from mhacut.checkpoint.huggingface import ImageModel, write_huggingface
from mhacut.checkpoint.record import SlimRecord
from mhacut.checkpoint.write import write_slim
from mhacut.errors import CheckpointError, option_name
from mhacut.finetuning.folder import BEST, LAST
from mhacut.finetuning.held_out import find_learning_rate, measured_score
from mhacut.finetuning.result import Progress
from mhacut.finetuning.run import Run
from mhacut.measuring.accuracy import Evaluation, accuracy_for_history
from mhacut.options.finetune import FinetuneOptions
from mhacut.runtime.device import software_versions

# A slim file is passed on: it does not reveal where files lie on the machine that made it.
_LOCAL_OPTIONS = frozenset(
    {"checkpoint", "output", "overwrite", "resume", "teacher", "data_dir", "class_map", "workers", "log"}
)


def start(run: Run) -> None:
    """Begin a new run, or restore the saved state of a resumed run. Every process must call this function."""
    resuming, state = run.options.resume is not None, None
    with run.processes.fail_together():
        if run.processes.first and not resuming:
            run.folder.check_new(run.options)
            run.folder.clear()
            run.folder.write_arguments(run.options)
        if resuming:  # every process reads the file: 3 models are faster to read than to send
            state = run.folder.read_state()
            if state is not None:
                _restore(run, state)
                if run.processes.first:  # the run may have been killed before it wrote the summary
                    run.folder.write_summary(run.progress.summary())
    if state is not None:
        step, total = run.progress.step, run.total_steps
        done = f"all {total} steps are done; nothing left to train"
        run.reporter.log(done if step >= total else f"resuming after step {step} of {total}")
        return
    if resuming:
        run.reporter.log(f"{run.folder.path}: no saved step; starting from the first step")
    if run.options.lr is None:
        run.options = replace(run.options, lr=find_learning_rate(run))
        run.trainer = run.new_trainer(run.options, total_steps=run.total_steps)
        with run.processes.fail_together():
            if run.processes.first:
                run.folder.write_arguments(run.options)
    # The initial weights are a candidate for the best file, which is therefore never worse.
    run.progress.start, run.progress.before = measured_score(run)
    run.progress.best = run.progress.start
    if run.progress.best is not None:
        with run.processes.fail_together():
            write_weights(run, BEST, run.progress.before)


def _restore(run: Run, state: Mapping[str, Any]) -> None:
    try:
        before, progress = state["inputs"], Progress.from_state(state["progress"])
        changed = [
            f"{name} ({before.get(name)!s:.40}, now {value!s:.40})"
            for name, value in _inputs(run).items()
            if before.get(name) != value
        ]
        if not changed:
            run.trainer.load_state_dict(state["trainer"])
            run.progress = progress
    except Exception as error:  # torch and each optimiser raise different errors
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.100}"
        raise run.folder.not_resumable(f"does not fit this run ({reason})") from error
    if changed:
        raise CheckpointError(
            f"{run.folder.path}: cannot resume, because inputs differ from the start of the run: "
            f"{', '.join(changed)}. Restore them, or start a new run. Images per step are processes x "
            f"{option_name('batch_size')} x {option_name('grad_accum_steps')}"
        )
    if run.progress.best is not None and not run.weights(BEST).exists():
        run.progress.best = None  # the weights of the next epoch take its place


def _inputs(run: Run) -> dict[str, Any]:
    return {
        "slim file": run.loaded.sha256,
        "teacher": run.teacher_sha256,
        "training images": run.images.description,
        "validation images": None if run.validation is None else run.validation.description,
        "images per step": run.images_per_step,
        "steps": run.total_steps,
    }


def save(run: Run, evaluation: Evaluation | None = None) -> None:
    """Write the last weights and the state for a resume. Every process must call this function."""
    parts = run.processes.gather(list(run.progress.unreadable))
    run.progress.unreadable = dict.fromkeys(name for part in parts for name in part)
    with run.processes.fail_together():
        write_weights(run, LAST, evaluation)
        if run.processes.first:
            # The state after the weights: a run that is killed between them repeats the steps since the
            # state before, with the same result.
            state = {"trainer": run.trainer.state_dict(), "progress": asdict(run.progress)}
            run.folder.write_state({"inputs": _inputs(run), **state})
            run.folder.write_summary(run.progress.summary())


def write_weights(run: Run, name: str, evaluation: Evaluation | None) -> None:
    """Write the trained weights, or their average, as slim file ``name``, and record ``evaluation``."""
    if not run.processes.first:
        return
    dtypes = dict(run.loaded.dtypes)  # training is in float32, also of a file in half precision
    if run.options.dtype is not None:
        chosen = getattr(torch, run.options.dtype)
        dtypes = {key: chosen if dtype.is_floating_point else dtype for key, dtype in dtypes.items()}
    model, record = run.trainer.result, _record_after(run, evaluation)
    if isinstance(model, ImageModel):
        dtype = next(dtype for dtype in dtypes.values() if dtype.is_floating_point)
        write_huggingface(run.weights(name), model.model, record.history, dtype=dtype, overwrite=True)
        return
    write_slim(
        run.weights(name),
        model,
        record,
        dtypes=dtypes,
        overwrite=True,
        input_path=run.loaded.path,
    )


def _record_after(run: Run, evaluation: Evaluation | None) -> SlimRecord:
    earlier = run.loaded.record
    assert earlier is not None
    entry = {
        "command": "finetune",
        "options": portable(run.options),
        "seed": run.options.seed,
        "steps": run.progress.step,
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
    return {key: value for key, value in options.values().items() if key not in _LOCAL_OPTIONS}
