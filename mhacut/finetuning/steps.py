"""The steps of a run, one after another, until all are done or a signal asks to stop."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from shlex import quote

from mhacut.errors import Interrupted, MhacutError, option_name
from mhacut.finetuning.images import Batch, training_loader
from mhacut.finetuning.logs import Logs
from mhacut.finetuning.run import Run
from mhacut.finetuning.saving import end_epoch, log_unreadable, save
from mhacut.runtime.distributed import of_lost_process
from mhacut.runtime.process import StopRequest, worker_count


@dataclass(frozen=True)
class Trained:
    """Result of :func:`train`."""

    images_per_second: float
    """Speed over all processes, without measuring and saving."""
    asked_to_stop: bool
    """Whether a signal asked to stop during the last step."""


def train(run: Run, logs: Logs, request: StopRequest) -> Trained:
    """Take all steps that are left; every process must call this.

    Raises:
        Interrupted: a signal asked to stop before the last step; everything is saved.
        MhacutError: the loss is not finite.
        DataError: too many images cannot be read.
        OutputError: a file cannot be written.
    """
    accumulated, processes = run.options.training.grad_accum_steps, run.processes
    loader = training_loader(
        run.images,
        run.batches,
        start=run.progress.step,
        stop=run.total_steps,
        mine=[micro * processes.size + processes.rank for micro in range(accumulated)],
        workers=worker_count(run.options.data.workers),
        pin_memory=processes.device.type == "cuda",
    )
    # Closing ends the processes that read images. An exception that is being shown could keep the loader
    # alive until Python waits for them.
    with closing(loader):
        try:
            return _take_steps(run, loader, logs, request)
        except RuntimeError as error:
            # While this process waited for others, Python took two signals for one: it was only asked to
            # stop, and those that had seen the first were ended by the second.
            if of_lost_process(error) and request.asked:
                kept = _unsaved(run) if run.replaces else f"what was saved is whole. {_how_to_go_on(run)}"
                raise Interrupted(f"another process ended while this one stopped; {kept}") from error
            raise


def _take_steps(run: Run, loader: Iterator[Batch], logs: Logs, request: StopRequest) -> Trained:
    options, progress = run.options, run.progress
    run.reporter.start("training")
    seconds, images, stop = 0.0, 0, 0.0
    while progress.step < run.total_steps:
        began = time.perf_counter()
        batches = _logging_unreadable(run, islice(loader, options.training.grad_accum_steps))
        loss, count = run.trainer.step(progress.step, batches)
        loss, seen, stop = run.processes.total([loss, count, float(request.asked)])
        _check_finite(run, loss)
        progress.add_step(loss, int(seen))
        seconds += time.perf_counter() - began
        images += int(seen)
        _report_step(run, loss / seen, images / seconds)
        if progress.step % run.batches.steps_per_epoch == 0 or progress.step == run.total_steps:
            end_epoch(run, logs, request)
            stop = max(stop, *run.processes.total([float(request.asked)]))
            if progress.step < run.total_steps:
                run.reporter.start("training")
        elif stop or (options.save_every and progress.step % options.save_every == 0):
            save(run)
            so_far = progress.epoch_loss / progress.epoch_images
            run.reporter.log(f"step {progress.step}: loss {so_far:.4f} so far in this epoch; saved")
        if stop and progress.step < run.total_steps:
            raise Interrupted(
                f"stopped after step {progress.step} of {run.total_steps}; everything is saved. "
                f"{_how_to_go_on(run)}"
            )
    return Trained(images / seconds if seconds else 0.0, stop > 0)


def _logging_unreadable(run: Run, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Pass on ``batches``, and collect the images that others had to replace."""
    unreadable = run.progress.unreadable
    for batch in batches:
        for bad in batch.unreadable:
            if bad.file not in unreadable:
                unreadable[bad.file] = None
                log_unreadable(run, f"{bad.file}: {bad.reason}")
        yield batch


def _check_finite(run: Run, loss: float) -> None:
    if math.isfinite(loss):
        return
    kept = _unsaved(run)
    if run.progress.saved is not None:
        kept = f"{run.folder.path} keeps what was saved after step {run.progress.saved}"
    advice = f"Try a smaller {option_name('lr')}, or a {option_name('clip_grad')}"
    if run.progress.step == 0:
        teacher = "" if run.options.teaching.teacher is None else f" and of {option_name('teacher')}"
        advice = f"No weight has changed yet: look at the outputs of the model{teacher} on these images"
    if run.options.amp:
        advice += f", or go without {option_name('amp')}"
    with run.processes.together():
        raise MhacutError(
            f"the loss became {loss} at step {run.progress.step + 1} of {run.total_steps}; {kept}. {advice}"
        )


def _unsaved(run: Run) -> str:
    return "nothing was saved yet" + (f", {run.folder.path} keeps its earlier run" if run.replaces else "")


def _report_step(run: Run, loss: float, rate: float) -> None:
    step, per_epoch = run.progress.step, run.batches.steps_per_epoch
    epoch, epochs = (step - 1) // per_epoch + 1, -(-run.total_steps // per_epoch)
    run.reporter.advance(
        step,
        run.total_steps,
        f"epoch {epoch}/{epochs} loss {loss:.4f} {rate:.0f} images/s",
    )


def _how_to_go_on(run: Run) -> str:
    """Return the command line that resumes the run, with as many processes on this machine."""
    size, launcher = run.processes.size, ""
    if size > 1:
        launcher = f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', size)} -m "
    return f"Continue with: {launcher}mhacut finetune --resume {quote(str(run.folder.path))}"
