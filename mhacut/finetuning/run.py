"""Setup of a fine-tuning run in one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.huggingface import is_huggingface
from mhacut.checkpoint.load import open_checkpoint
from mhacut.checkpoint.preprocessing import Provenance, provenance, resolve_preprocessing, with_hint
from mhacut.data import EvaluationLoader, Preprocessing, WithoutLabels, evaluation_loader, has_split
from mhacut.errors import CheckpointError, UsageError, option_name
from mhacut.finetuning.folder import RunFolder, folder_of
from mhacut.finetuning.images import StepBatches, TrainingImages, training_images
from mhacut.finetuning.objective import Mixing, make_objective, with_dense_model
from mhacut.finetuning.result import Progress
from mhacut.finetuning.training import Trainer
from mhacut.measuring.accuracy import Evaluation, evaluate
from mhacut.measuring.normalisation import SAMPLE
from mhacut.options.finetune import FinetuneOptions
from mhacut.runtime.device import warn_of_slow_amp
from mhacut.runtime.distributed import Processes
from mhacut.runtime.files import REMOTE
from mhacut.runtime.progress import Reporter
from mhacut.surgery.find import classifier_size
from mhacut.surgery.flops import measure_flops

RATES = (3e-4, 1e-4, 3e-5, 1e-5)
"""Learning rates to try, from the highest to the lowest, until a trial is accepted."""
_FEW_STEPS = 1000
"""If a run would have fewer steps than this with a batch size of 64, the default batch size is 16."""
_MAX_HELD_OUT = 256
"""Largest number of held-out images. At most 1/10 of the training images are held out."""


@dataclass
class Run:
    options: FinetuneOptions
    processes: Processes
    reporter: Reporter
    loaded: Checkpoint
    folder: RunFolder
    preprocessing: Preprocessing
    provenance: Provenance
    """Origin of each value in ``preprocessing``, for example the file or an option."""
    flops: int
    images: TrainingImages
    batches: StepBatches
    total_steps: int
    validation: EvaluationLoader | None
    """Share of the labelled validation images that this process measures; None without these images."""
    trainer: Trainer
    new_trainer: Callable[..., Trainer]
    """Function of ``options`` and ``total_steps`` that returns a new trainer of the same model."""
    held_out: TrainingImages | None
    """Training images that choose the learning rate and, without validation images, the best weights. None if
    these images are not needed, or if there are too few images."""
    teacher_sha256: str | None
    progress: Progress = field(default_factory=Progress)

    @property
    def images_per_step(self) -> int:
        return self.batches.batch_size * self.batches.parts

    def weights(self, name: str) -> Path:
        """Return the path of slim file ``name``. For transformers models, it is a folder without suffix."""
        path = self.folder.file(name)
        return path.with_suffix("") if is_huggingface(self.loaded) else path

    def measure(self, model: nn.Module) -> Evaluation:
        """Return the accuracy of ``model`` on the validation images. Every process must call this method."""
        assert self.validation is not None
        with self.processes.fail_together():
            part = evaluate(
                model, self.validation, device=self.processes.device, progress=self.reporter.advance
            )
        if self.processes.size == 1:
            return part
        # Processes may have different numbers of images: sums of correct images are exact.
        shares = [part.top1 / 100, (part.top5 or 0.0) / 100, part.loss or 0.0, 1.0]
        top1, top5, loss, images = self.processes.total([share * part.images for share in shares])
        return Evaluation(
            top1=100 * round(top1) / images,
            top5=None if part.top5 is None else 100 * round(top5) / images,
            images=int(images),
            seconds=part.seconds,
            loss=loss / images,
        )


def read_run(options: FinetuneOptions, processes: Processes, reporter: Reporter) -> Run:
    if options.amp and options.amp_dtype == "bfloat16":
        warn_of_slow_amp(processes.device, reporter.log)
    reporter.start("reading")
    loaded = _read_slim(options, reporter)
    options = with_dense_model(options, loaded, reporter)
    classes = classifier_size(loaded.model)
    if is_huggingface(loaded) and options.given:
        names = ", ".join(sorted(map(option_name, options.given)))
        raise UsageError(f"{names}: a transformers folder has its own preprocessing; change it there")
    preprocessing = resolve_preprocessing(loaded, options)
    flops = measure_flops(loaded.model, preprocessing.input_size)
    images = _training_images(options, preprocessing, classes)
    parts = processes.size * options.grad_accum_steps
    few = options.steps is None and options.epochs * images.count < 64 * parts * _FEW_STEPS
    size = options.batch_size or (16 if few else 64)
    options = replace(options, batch_size=size)
    labelled = partial(
        evaluation_loader, preprocessing, options, num_classes=classes, batch_size=max(size, 64)
    )
    validation = _validation_images(options, labelled, classes, processes, reporter)
    held_out, spare = None, min(_MAX_HELD_OUT, images.count // 10, images.count - size * parts)
    if spare > 0 and (validation is None or options.lr is None):
        remaining, held_out = images.divided(spare, preprocessing, options.seed)
        # With validation images, held-out images only choose the learning rate, and training uses all.
        images = remaining if validation is None else images
    if held_out is None and options.lr is None:
        options = replace(options, lr=RATES[1])
    batches = StepBatches(images.count, batch_size=size, parts=parts, seed=options.seed)
    total_steps = options.steps or options.epochs * batches.steps_per_epoch
    origins = provenance(loaded, options)
    if validation is not None and processes.first and options.resume is None:
        sample = partial(labelled, limit=SAMPLE)
        origins = with_hint(origins, loaded.model, preprocessing, sample, processes.device)
    if origins.hint is not None:
        reporter.log(origins.hint)
    model = _with_shared_batch_norm(loaded.model.to(processes.device), processes, reporter)
    new_trainer = partial(
        Trainer,
        model,
        make_objective(options, loaded, model, preprocessing, reporter),
        Mixing(options, classes),
        processes=processes,
        labelled=images.labelled,
        steps_per_epoch=batches.steps_per_epoch,
    )
    # Created here, so that invalid options fail before files are written.
    trainer = new_trainer(options if options.lr else replace(options, lr=RATES[0]), total_steps=total_steps)
    teacher = trainer.objective.teacher
    return Run(
        options=options,
        processes=processes,
        reporter=reporter,
        loaded=loaded,
        folder=folder_of(options, loaded.stem),
        preprocessing=preprocessing,
        provenance=origins,
        flops=flops,
        images=images,
        batches=batches,
        total_steps=total_steps,
        validation=validation,
        trainer=trainer,
        new_trainer=new_trainer,
        held_out=held_out,
        teacher_sha256=None if teacher is None else teacher.sha256,
    )


def _read_slim(options: FinetuneOptions, reporter: Reporter) -> Checkpoint:
    source = os.fspath(options.checkpoint)
    loaded = None if source.startswith(REMOTE) else open_checkpoint(source)
    if loaded is None or loaded.record is None:
        raise CheckpointError(
            f"{source}: not a slim file; prune the model first: mhacut prune {source} --flops 50%"
        )
    _ = loaded.model
    for note in loaded.notes:
        reporter.log(note)
    return loaded


def _training_images(options: FinetuneOptions, preprocessing: Preprocessing, classes: int) -> TrainingImages:
    has_teacher = options.teacher is not None
    if classes < 2 and not has_teacher:
        head = "no classifier" if classes == 0 else "a single output"
        raise UsageError(
            f"{options.checkpoint}: has {head}, so it needs a {option_name('teacher')} to learn from"
        )
    return training_images(
        options,
        preprocessing,
        options,
        num_classes=classes,
        use_labels=options.labels and not (has_teacher and options.label_weight == 0),
        need_labels=not has_teacher,
    )


def _validation_images(
    options: FinetuneOptions,
    labelled: Callable[..., EvaluationLoader],
    classes: int,
    processes: Processes,
    reporter: Reporter,
) -> EvaluationLoader | None:
    if options.eval_images == 0 or classes < 2:  # one class has no accuracy that could fall
        return None
    if not has_split(options, options.val_split):
        reporter.log(
            f"accuracy is not measured: found no split {options.val_split!r} in {options.data_dir} "
            f"({option_name('val_split')})"
        )
        return None
    try:
        return labelled(limit=options.eval_images, part=(processes.rank, processes.size))
    except WithoutLabels as error:
        if options.eval_images is not None:
            raise  # the user asked for accuracy
        reporter.log(f"accuracy is not measured: {error}")
        return None


def _with_shared_batch_norm(model: nn.Module, processes: Processes, reporter: Reporter) -> nn.Module:
    """Return ``model`` with batch norms that use the images of all processes, if CUDA is used."""
    if processes.size == 1 or not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return model
    if processes.device.type == "cuda":
        shared: nn.Module = convert_sync_batchnorm(model)
        return shared
    reporter.log("batch norms use the images of 1 process each: only CUDA processes share batch statistics")
    return model
