"""The training loop, and logs to TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from itertools import islice
from shlex import quote
from typing import Any

from mhacut.errors import MhacutError, option_name
from mhacut.finetuning.folder import BEST, TENSORBOARD
from mhacut.finetuning.held_out import measured_score, parts_of
from mhacut.finetuning.images import Batch
from mhacut.finetuning.result import EpochSummary
from mhacut.finetuning.run import Run
from mhacut.finetuning.saving import portable, save, write_weights

_MAX_NAMED = 10
"""Largest number of unreadable images that the log names. The result names all of them."""


def train(run: Run) -> float:
    """Run the remaining training steps. Return images per second. Every process must call this function."""
    loader = parts_of(run, run.images, run.batches, range(run.progress.step, run.total_steps))
    # Closing ends the processes that read images. An exception that is being shown could keep the loader
    # alive until Python waits for them.
    with closing(loader), Logs(run) as logs:
        try:
            return _take_steps(run, loader, logs)
        except KeyboardInterrupt:
            folder = quote(str(run.folder.path))
            run.reporter.log(
                f"stopped after step {run.progress.step} of {run.total_steps}. "
                f"Continue from the last save with: mhacut finetune --resume {folder}"
            )
            raise


def _take_steps(run: Run, loader: Iterator[Batch], logs: Logs) -> float:
    options, progress = run.options, run.progress
    run.reporter.start("training")
    seconds, images = 0.0, 0
    while progress.step < run.total_steps:
        began = time.perf_counter()
        # Lazily: the next part is read while the network works on this one.
        batches = _log_unreadable(run, islice(loader, options.grad_accum_steps))
        loss, count = run.trainer.step(progress.step, batches)
        loss, seen = run.processes.total([loss, count])
        _check_finite(run, loss)
        progress.step += 1
        progress.epoch_loss += loss
        progress.epoch_images += int(seen)
        seconds += time.perf_counter() - began
        images += int(seen)
        step, per_epoch = progress.step, run.batches.steps_per_epoch
        epoch, epochs = (step - 1) // per_epoch + 1, -(-run.total_steps // per_epoch)
        detail = f"epoch {epoch}/{epochs} loss {loss / seen:.4f} {images / seconds:.0f} images/s"
        run.reporter.advance(step, run.total_steps, detail)
        # With --steps, the last epoch may be incomplete; it is summarised like others.
        if step % per_epoch == 0 or progress.step == run.total_steps:
            _end_epoch(run, logs)
            run.reporter.start("training")
        elif options.save_every and progress.step % options.save_every == 0:
            save(run)
            so_far = progress.epoch_loss / progress.epoch_images
            run.reporter.log(f"step {progress.step}: loss {so_far:.4f} so far in this epoch; saved")
    return images / seconds if seconds else 0.0


def _log_unreadable(run: Run, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield ``batches`` unchanged. Log their unreadable images, and add them to ``run.progress``."""
    unreadable = run.progress.unreadable
    for batch in batches:
        for bad in batch.unreadable:
            if bad.file not in unreadable:
                unreadable[bad.file] = None
                if len(unreadable) <= _MAX_NAMED:
                    run.reporter.log(f"{bad.file}: unreadable, replaced by another image ({bad.reason})")
        yield batch


def _check_finite(run: Run, loss: float) -> None:
    if math.isfinite(loss):
        return
    advice = f"Try a smaller {option_name('lr')}, a {option_name('clip_grad')}"
    if run.options.amp:
        advice += f", or training without {option_name('amp')}"
    # The loss is a sum over processes, so that all fail here, and one of them reports the error.
    with run.processes.fail_together():
        raise MhacutError(
            f"the loss became {loss} at step {run.progress.step + 1} of {run.total_steps}. {advice}, and "
            f"check the outputs of the model for these images. {run.folder.path} holds the last saved weights"
        )


def _end_epoch(run: Run, logs: Logs) -> None:
    progress = run.progress
    score, evaluation = measured_score(run)
    row = EpochSummary(
        epoch=len(progress.rows),
        train_loss=progress.epoch_loss / progress.epoch_images,
        eval_loss=evaluation.loss if evaluation is not None else None if score is None else -score,
        eval_top1=None if evaluation is None else evaluation.top1,
        eval_top5=None if evaluation is None else evaluation.top5,
        lr=run.trainer.lr,
    )
    progress.rows.append(row)
    progress.epoch_loss, progress.epoch_images = 0.0, 0
    measured = "" if score is None else f", {-score:.4f} on held-out images"
    measured = measured if evaluation is None else f", top-1 {evaluation.top1:.2f}%"
    run.reporter.log(f"epoch {row.epoch + 1}: loss {row.train_loss:.4f}{measured}")
    if score is not None and (progress.best is None or score > progress.best):
        progress.best = score
        with run.processes.fail_together():
            write_weights(run, BEST, evaluation)
    save(run, evaluation)
    logs.write(progress.summary()[-1])


def check_logs(names: tuple[str, ...]) -> None:
    for name in names:  # which is also the name of its module, and of the extra of mhacut that installs it
        if importlib.util.find_spec(name) is None:
            option = option_name("log", name)
            raise MhacutError(f"{option}: requires the package {name}: pip install 'mhacut[{name}]'")


class Logs:
    """Loggers for TensorBoard and Weights & Biases. If a logger fails, training continues without it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._open: dict[str, Any] = {}
        """Open TensorBoard writer and Weights & Biases run, by the name of the logger."""

    def __enter__(self) -> Logs:
        for name in self._run.options.logs if self._run.processes.first else ():
            self._guarded(name, partial(self._start, name))
        return self

    def __exit__(self, *error: object) -> None:
        for name, log in list(self._open.items()):
            self._guarded(name, log.close if name == "tensorboard" else log.finish)

    def write(self, row: Mapping[str, float | None]) -> None:
        values = {name: value for name, value in row.items() if value is not None}
        for name, log in list(self._open.items()):
            self._guarded(name, partial(_send, log, name, values))

    def _start(self, name: str) -> None:
        folder = self._run.folder.path
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._open[name] = SummaryWriter(str(folder / TENSORBOARD))
        else:
            import wandb

            options = portable(self._run.options)
            self._open[name] = wandb.init(project="mhacut", dir=str(folder), name=folder.name, config=options)

    def _guarded(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # third parties' disks, networks and accounts fail in many ways
            self._open.pop(name, None)
            option, reason = option_name("log", name), f"{type(error).__name__}: {error!s:.200}"
            self._run.reporter.log(f"{option}: logging stopped, training continues ({reason})")


def _send(log: Any, name: str, values: Mapping[str, float]) -> None:
    if name == "wandb":
        log.log(values)
        return
    for column in values.keys() - {"epoch"}:
        log.add_scalar(column, values[column], int(values["epoch"]))
    log.flush()
