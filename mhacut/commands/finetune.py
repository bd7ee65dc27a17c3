"""``mhacut finetune`` as a function: read, train, save as it goes, measure what was written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.load import load_model, open_checkpoint, read_model
from mhacut.checkpoint.preprocessing import resolve_preprocessing
from mhacut.checkpoint.pretrained import TIMM_PREFIX
from mhacut.checkpoint.write import write_slim
from mhacut.errors import CheckpointError, DataError, Interrupted, MhacutError, OutputError
from mhacut.finetuning.folder import BEST, LAST, RunFolder
from mhacut.finetuning.history import portable, record_after, record_of
from mhacut.finetuning.images import Batch, StepBatches, TrainingImages, training_images, training_loader
from mhacut.finetuning.interrupt import StopRequest, stop_request
from mhacut.finetuning.logs import Logs, check_logs
from mhacut.finetuning.measuring import measure, validation_images
from mhacut.finetuning.objective import Mixing
from mhacut.finetuning.result import EpochSummary, FinetuneResult
from mhacut.finetuning.resuming import check_same, completed
from mhacut.finetuning.teaching import lesson_of
from mhacut.finetuning.training import Trainer, check_precision, repeatable
from mhacut.measuring.accuracy import Evaluation
from mhacut.options.base import PathLike
from mhacut.options.finetune import FinetuneOptions
from mhacut.runtime.device import warn_of_slow_amp
from mhacut.runtime.distributed import Processes, gathered
from mhacut.runtime.files import check_output
from mhacut.runtime.progress import Reporter, Silent
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.info import classifier_size

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mhacut.options.keywords import FinetuneKeywords

_MOST_UNREADABLE = 0.1
"""Share of the images for which others may stand in."""


def finetune(
    checkpoint: PathLike | None = None,
    *,
    reporter: Reporter | None = None,
    **options: Unpack[FinetuneKeywords],
) -> FinetuneResult:
    """Train a slim file on, and write a better one.

        result = mhacut.finetune("vit-2.0G.safetensors", teacher="vit.safetensors", data_dir="images/")
        model = mhacut.load_model(result.output)

    Under torchrun every process calls this alike, and shares the work.

    Args:
        checkpoint: a slim file; left out to go on with a run (``resume``).
        reporter: told what happens; silent by default.
        options: the names of the command line's flags, see
            :class:`mhacut.options.finetune.FinetuneOptions`: ``data_dir``, ``output``, ``teacher``,
            ``epochs``, ``lr``, ``resume``, ...

    Raises:
        Interrupted: asked to stop; all is saved.
        MhacutError: and its kinds, in :mod:`mhacut.errors`.
    """
    given = options if checkpoint is None else {"checkpoint": checkpoint, **options}
    return run_finetune(FinetuneOptions.from_flat(**completed(given)), reporter or Silent())


def run_finetune(options: FinetuneOptions, reporter: Reporter) -> FinetuneResult:
    """:func:`finetune` with its options in one object."""
    check_logs(options.logs)
    with gathered(options.device) as processes, _random_state_kept(), repeatable(options):
        check_precision(options, processes.device)
        with processes.together():
            run = _Run(options, processes, reporter if processes.first else Silent())
        try:
            return run.go()
        finally:
            run.trainer.disconnect()


class _Run:
    """One run, seen from one process."""

    def __init__(self, options: FinetuneOptions, processes: Processes, reporter: Reporter) -> None:
        self.options, self.processes, self.reporter = options, processes, reporter
        self.device = processes.device
        if options.amp:
            warn_of_slow_amp(self.device, reporter.log)
        reporter.start("reading")
        self.loaded = _read_slim(options)
        for note in self.loaded.notes:
            reporter.log(note)
        stem = self.loaded.stem
        self.folder = RunFolder(Path(options.resume or options.output or f"{stem}-finetuned"))
        self.classes = classifier_size(self.loaded.model)
        self.preprocessing = resolve_preprocessing(self.loaded, options.preprocessing)
        self.flops = measure_flops(self.loaded.model, self.preprocessing.input_size)
        training = options.training
        taught = options.teaching.teacher is not None
        self.images: TrainingImages = training_images(
            options.data,
            self.preprocessing,
            options.augmentation,
            num_classes=self.classes,
            use_labels=options.labels and not (taught and options.teaching.label_weight == 0),
            need_labels=not taught,
        )
        self.batches = StepBatches(
            self.images.count,
            batch_size=training.batch_size,
            parts=processes.size * training.grad_accum_steps,
            seed=training.seed,
        )
        per_epoch = self.batches.steps_per_epoch
        self.total_steps = training.steps or training.epochs * per_epoch
        self.validation = validation_images(
            options, self.preprocessing, self.classes, processes, reporter.log
        )
        model = self.loaded.model.to(self.device)
        if processes.size > 1 and any(isinstance(module, _BatchNorm) for module in model.modules()):
            if self.device.type == "cuda":
                model = convert_sync_batchnorm(model)
            else:
                reporter.log("batch norms see the images of one process only: CPUs cannot share statistics")
        distillation = lesson_of(options, self.loaded, model, self.preprocessing, self.device, reporter.log)
        self.teacher_sha256 = distillation.teacher_sha256
        self.trainer = Trainer(
            model,
            distillation.objective,
            Mixing(options.augmentation, self.classes),
            options,
            processes,
            labelled=self.images.labelled,
            total_steps=self.total_steps,
            steps_per_epoch=per_epoch,
        )
        self.began_with = {
            "plan": _digest(record_of(self.loaded).plan.to_json()),
            "slim file": self.loaded.sha256,
            "teacher": self.teacher_sha256,
            "training images": self.images.fingerprint,
            "validation images": None if self.validation is None else self.validation.fingerprint,
            "images per step": self.batches.batch_size * self.batches.parts,
        }
        self.step = 0
        self.saved: int | None = None
        self.asked_to_stop = False
        self.epoch_loss, self.epoch_images = 0.0, 0
        self.rows: list[EpochSummary] = []
        self.best: float | None = None
        self.before: Evaluation | None = None
        self.unreadable: dict[str, None] = {}
        self.logs: Logs | None = None

    # -- the run --

    def go(self) -> FinetuneResult:
        began = time.perf_counter()
        self._open()
        self.trainer.connect()
        self.reporter.log(f"training on {self.images.description}")
        if self.processes.first:
            self.logs = Logs(self.options.logs, self.folder.path, portable(self.options), self.reporter.log)
        try:
            with stop_request() as request:
                rate = self._train(request)
        finally:
            if self.logs is not None:
                self.logs.close()
        output = self.folder.file(BEST if self.best is not None else LAST)
        after = None
        if self.validation is not None:
            not_measured = (
                f"all {self.total_steps} steps are done and saved; {output} was not measured to the end"
            )
            if self.asked_to_stop:
                raise Interrupted(not_measured)
            self.reporter.start("measuring the file")
            with self.processes.together():
                written = load_model(output)
            try:
                after = self._measure(written)
            except KeyboardInterrupt:
                raise Interrupted(not_measured) from None
        return FinetuneResult(
            folder=self.folder.path,
            output=output,
            architecture=self.loaded.identity.architecture,
            before=self.before,
            after=after,
            epochs=tuple(self.rows),
            steps=self.step,
            flops=self.flops,
            data=self.images.description,
            unreadable=tuple(self.unreadable),
            images_per_second=rate,
            device=str(self.device),
            processes=self.processes.size,
            seconds=time.perf_counter() - began,
        )

    def _open(self) -> None:
        """Begin, or go on from what is there."""
        state = None
        with self.processes.together():
            if self.options.resume is not None:
                if self.processes.first:
                    self.folder.sweep()
                state = self.folder.read_state()
                if state is not None:
                    check_same(state["began_with"], self.began_with, str(self.folder.path))
            elif self.processes.first:
                self._open_new()
        if state is None:
            if self.options.resume is not None:
                self.reporter.log(f"{self.folder.path}: no step was saved, beginning with the first")
            if self.validation is not None:
                self.reporter.start("measuring before")
                self.before = self._measure(self.trainer.model)
            return
        self.trainer.restore(state["trainer"])
        self.step = self.saved = state["step"]
        self.best = state["best"]
        self.epoch_loss, self.epoch_images = state["epoch_loss"], state["epoch_images"]
        self.rows = [EpochSummary(**row) for row in state["rows"]]
        self.before = None if state["before"] is None else Evaluation(**state["before"])
        self.unreadable = dict.fromkeys(state["unreadable"])
        self.reporter.log(f"going on after step {self.step} of {self.total_steps}")

    def _open_new(self) -> None:
        teacher = self.options.teaching.teacher
        read = [self.loaded.path]
        if teacher is not None and not str(teacher).startswith(TIMM_PREFIX):
            read.append(Path(teacher))
        for name in (LAST, BEST):
            for path in read:
                check_output(self.folder.file(name), overwrite=True, input_path=path)
        self.folder.open_new(overwrite=self.options.overwrite)
        self.folder.write_arguments(_whole_paths({**self.options.flat(), "overwrite": False}))

    def _train(self, request: StopRequest) -> float:
        """All steps that are left; gives images per second."""
        accumulated = self.options.training.grad_accum_steps
        mine = [micro * self.processes.size + self.processes.rank for micro in range(accumulated)]
        loader = training_loader(
            self.images,
            self.batches,
            start=self.step,
            stop=self.total_steps,
            mine=mine,
            workers=self.options.data.workers,
            pin_memory=self.device.type == "cuda",
        )
        # Closed, it ends the processes that read images; an exception that is still told could keep it alive
        # until Python waits for them.
        with closing(loader):
            return self._train_on(loader, request)

    def _train_on(self, loader: Iterator[Batch], request: StopRequest) -> float:
        training, per_epoch = self.options.training, self.batches.steps_per_epoch
        accumulated = training.grad_accum_steps
        self.reporter.start("training")
        seconds, images = 0.0, 0
        while self.step < self.total_steps:
            began = time.perf_counter()
            batches = self._noted(islice(loader, accumulated))
            loss, count = self.trainer.step(self.step, batches)
            loss, seen, stop = self.processes.total([loss, count, float(request.asked)])
            if not math.isfinite(loss):
                with self.processes.together():
                    raise self._diverged(loss)
            self.step += 1
            self.epoch_loss += loss
            self.epoch_images += int(seen)
            seconds += time.perf_counter() - began
            images += int(seen)
            self._tell(loss / seen, images / seconds, seconds)
            ended = self.step % per_epoch == 0 or self.step == self.total_steps
            every = self.options.save_every
            if ended:
                self._end_epoch(request)
                stop = max(stop, *self.processes.total([float(request.asked)]))
                self.reporter.start("training")
            elif stop or (every and self.step % every == 0):
                self._save()
                so_far = self.epoch_loss / self.epoch_images
                self.reporter.log(f"step {self.step}: loss {so_far:.4f} so far in this epoch; saved")
            if stop and self.step < self.total_steps:
                raise Interrupted(
                    f"stopped after step {self.step} of {self.total_steps}; all is saved. "
                    f"Go on with: {self._launcher()}mhacut finetune --resume {quote(str(self.folder.path))}"
                )
            self.asked_to_stop = stop > 0
        return images / seconds if seconds else 0.0

    def _launcher(self) -> str:
        many = self.processes.size
        return (
            "" if many == 1 else f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', many)} -m "
        )

    def _noted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            for bad in batch.unreadable:
                if bad.file not in self.unreadable:
                    self.unreadable[bad.file] = None
                    self.reporter.log(f"unreadable, another image stands in for it: {bad.file}: {bad.reason}")
            yield batch

    def _diverged(self, loss: float) -> MhacutError:
        kept = "nothing was saved yet"
        if self.saved is not None:
            kept = f"{self.folder.path} keeps what was saved after step {self.saved}"
        return MhacutError(
            f"the loss became {loss} at step {self.step + 1} of {self.total_steps}; {kept}. "
            "Try a smaller --lr, or a --clip-grad" + (", or go without --amp" if self.options.amp else "")
        )

    def _tell(self, loss: float, rate: float, seconds: float) -> None:
        epoch = (self.step - 1) // self.batches.steps_per_epoch + 1
        epochs = -(-self.total_steps // self.batches.steps_per_epoch)
        size = self.batches.batch_size * self.batches.parts
        left = int((self.total_steps - self.step) * size / rate)
        self.reporter.advance(
            self.step,
            self.total_steps,
            f"epoch {epoch}/{epochs} step {self.step} loss {loss:.4f} {rate:.0f} images/s "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
        )

    # -- saving --

    def _end_epoch(self, request: StopRequest) -> None:
        """Measure, write what is best and last, and a line of the summary."""
        evaluation = None
        if self.validation is not None:
            self.reporter.start("measuring")
            evaluation = self._measure(self.trainer.result, request)
        row = EpochSummary(
            epoch=len(self.rows),
            train_loss=self.epoch_loss / self.epoch_images,
            eval_loss=None if evaluation is None else evaluation.loss,
            eval_top1=None if evaluation is None else evaluation.top1,
            eval_top5=None if evaluation is None else evaluation.top5,
            lr=self.trainer.lr,
        )
        self.rows.append(row)
        self.epoch_loss, self.epoch_images = 0.0, 0
        measured = "" if evaluation is None else f", top-1 {evaluation.top1:.2f}%"
        self.reporter.log(f"epoch {row.epoch + 1}: loss {row.train_loss:.4f}{measured}")
        if evaluation is not None and (self.best is None or evaluation.top1 > self.best):
            self.best = evaluation.top1
            with self.processes.together():
                self._write(BEST)
        self._save()
        if self.logs is not None:
            self.logs.write([dataclasses.asdict(row) for row in self.rows])

    def _save(self) -> None:
        """Write the last weights, and what the run goes on from."""
        self._share_unreadable()
        with self.processes.together():
            self._write_last()
        self.saved = self.step

    def _share_unreadable(self) -> None:
        """What any process could not read; the first says what it has not said of its own."""
        told = self.unreadable
        self.unreadable = dict.fromkeys(self.processes.union(list(told)))
        for file in self.unreadable:
            if file not in told:
                self.reporter.log(f"unreadable, another image stands in for it: {file}")

    def _write_last(self) -> None:
        if len(self.unreadable) > _MOST_UNREADABLE * self.images.count:
            raise DataError(
                f"{len(self.unreadable)} of {self.images.count} images cannot be read, first "
                f"{next(iter(self.unreadable))}; repair or remove them"
            )
        self._write(LAST)
        if self.processes.first:
            self.folder.write_summary([dataclasses.asdict(row) for row in self.rows])
            self.folder.write_state(
                {
                    "began_with": self.began_with,
                    "trainer": self.trainer.state(),
                    "step": self.step,
                    "best": self.best,
                    "epoch_loss": self.epoch_loss,
                    "epoch_images": self.epoch_images,
                    "rows": [dataclasses.asdict(row) for row in self.rows],
                    "before": None if self.before is None else dataclasses.asdict(self.before),
                    "unreadable": list(self.unreadable),
                }
            )

    def _write(self, name: str) -> None:
        if not self.processes.first:
            return
        dtypes = dict(self.loaded.dtypes)
        if self.options.dtype is not None:
            chosen = getattr(torch, self.options.dtype)
            dtypes = {key: chosen if dtype.is_floating_point else dtype for key, dtype in dtypes.items()}
        try:
            write_slim(
                self.folder.file(name),
                self.trainer.result,
                record_after(
                    self.loaded,
                    self.options,
                    self.preprocessing,
                    steps=self.step,
                    images_per_step=self.batches.batch_size * self.batches.parts,
                    teacher_sha256=self.teacher_sha256,
                    data=self.images.description,
                ),
                dtypes=dtypes,
                overwrite=True,
                input_path=self.loaded.path,
            )
        except OutputError as error:
            raise OutputError(f"after step {self.step}: {error}") from error

    def _measure(self, model: nn.Module, request: StopRequest | None = None) -> Evaluation:
        assert self.validation is not None

        def progress(done: int, total: int) -> None:
            self.reporter.advance(done, total)
            if request is not None and request.asked and not request.answered:
                request.answered = True
                self.reporter.log("stopping once this is measured and saved; asked again, at once")

        return measure(
            model,
            self.validation,
            self.processes,
            amp=self.options.amp,
            progress=progress,
        )


def _read_slim(options: FinetuneOptions) -> Checkpoint:
    source = os.fspath(options.checkpoint)
    if source.startswith(TIMM_PREFIX) or open_checkpoint(source).record is None:
        raise CheckpointError(f"{source}: is no slim file; cut it first: mhacut prune {source} --flops 50%")
    return read_model(source)


def _whole_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options with paths that hold from any working directory."""
    paths = {name: values[name] for name in ("checkpoint", "teacher", "data_dir", "class_map", "output")}
    return {
        **values,
        **{
            name: os.path.abspath(path) if path is not None and not path.startswith(TIMM_PREFIX) else path
            for name, path in paths.items()
        },
    }


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """The caller's random numbers go on afterwards as if nothing had drawn any."""
    python, numpy, generator = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(generator)
