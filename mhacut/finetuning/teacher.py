"""The teacher of a run, and the loss that the slim model is trained with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.identity import dense_args
from mhacut.checkpoint.load import read_model, states_its_model
from mhacut.checkpoint.preprocessing import resolve_preprocessing
from mhacut.data import Preprocessing
from mhacut.errors import (
    CheckpointError,
    PlanError,
    UnsupportedModelError,
    UsageError,
    option_name,
    options_written_by,
)
from mhacut.finetuning.history import record_of
from mhacut.finetuning.objective import Blocks, Objective, Teacher, check_matching
from mhacut.options.base import PathLike
from mhacut.options.finetune import FinetuneOptions
from mhacut.runtime.progress import Reporter
from mhacut.surgery.find import classifier_size
from mhacut.surgery.tokens import tokens_of, with_tokens

_OPTIONS = {
    "checkpoint": "teacher",
    "model": "teacher_model",
    "model_args": "teacher_model_args",
    "part": "teacher_part",
}
"""Options of a checkpoint, and those of the teacher."""


def make_objective(
    options: FinetuneOptions,
    slim: Checkpoint,
    student: nn.Module,
    preprocessing: Preprocessing,
    reporter: Reporter,
) -> Objective:
    """Open the teacher, if there is one, and return the loss of the run.

    Args:
        options: options of the run.
        slim: the slim file.
        student: its model, on the device that trains it.
        preprocessing: preprocessing of its images.
        reporter: receives a message where the teacher is not the slim file's dense model.

    Raises:
        CheckpointError: the teacher cannot be read, has another number of classes, or takes images of another
            size.
        UsageError: features are to be matched, and the blocks of the two do not match.
    """
    teaching, classes = options.teaching, classifier_size(student)
    blocks = Blocks(student) if teaching.feature_weight > 0 else None
    teacher = None
    if teaching.teacher is not None:
        teacher = _open_teacher(teaching.teacher, options, slim, student, preprocessing)
        if teacher.sha256 != _first_source(slim):
            reporter.log("the teacher is not the file that the slim model was cut from")
        if blocks is not None and teacher.blocks is not None:
            image = torch.zeros(1, *preprocessing.input_size, device=next(student.parameters()).device)
            check_matching(blocks.shapes(student, image), teacher.blocks.shapes(teacher.model, image))
    return Objective(
        teacher=teacher,
        student=blocks,
        label_weight=teaching.label_weight if teacher is not None else 1.0,
        temperature=teaching.kd_temperature,
        feature_weight=teaching.feature_weight,
        smoothing=options.augmentation.smoothing,
        classes=classes,
    )


def _open_teacher(
    source: PathLike,
    options: FinetuneOptions,
    slim: Checkpoint,
    student: nn.Module,
    preprocessing: Preprocessing,
) -> Teacher:
    loaded = _read_teacher(source, options, slim)
    own = _checked_preprocessing(loaded, options, slim, classifier_size(student), preprocessing)
    _check_runs(loaded, preprocessing)
    device = next(student.parameters()).device
    mean = [torch.tensor(images.mean, device=device) for images in (preprocessing, own)]
    std = [torch.tensor(images.std, device=device) for images in (preprocessing, own)]
    matched = options.teaching.feature_weight > 0
    model = _of_same_tokens(loaded.model, student) if matched else loaded.model
    return Teacher(model.to(device), mean, std, matched=matched, sha256=loaded.sha256)


def _of_same_tokens(teacher: nn.Module, student: nn.Module) -> nn.Module:
    """Return a teacher of equal outputs, whose last block computes the tokens that the student's does."""
    tokens = tokens_of(student)
    if tokens.merged:
        raise UsageError(
            f"{option_name('feature_weight')}: the blocks of a model that merges tokens match no teacher's "
            "blocks; leave it out"
        )
    try:
        return with_tokens(teacher, replace(tokens_of(teacher), read=tokens.read))
    except (PlanError, UnsupportedModelError) as error:
        raise UsageError(
            f"{option_name('feature_weight')}: the last block of the slim model computes only the tokens "
            f"that its classifier reads, and the teacher's last block cannot do so: {error}; leave it out"
        ) from error


@torch.no_grad()
def _check_runs(teacher: Checkpoint, preprocessing: Preprocessing) -> None:
    """Raise a :class:`CheckpointError` if the teacher fails on images of this size."""
    size = preprocessing.input_size
    try:
        teacher.model(torch.zeros(1, *size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{teacher.source}: the teacher cannot take the slim model's images, {'x'.join(map(str, size))} "
            f"({str(error).splitlines()[0]:.120}); give the dense model that it was cut from"
        ) from error


def _checked_preprocessing(
    loaded: Checkpoint,
    options: FinetuneOptions,
    slim: Checkpoint,
    classes: int,
    preprocessing: Preprocessing,
) -> Preprocessing:
    """Return the teacher's preprocessing; raise if its classes or image size differ from the slim model's."""
    found = classifier_size(loaded.model)
    if found != classes:
        raise CheckpointError(
            f"{option_name('teacher', loaded.source)}: has {found} classes, the slim model {classes}; give a "
            "teacher of the same classes"
        )
    # A file that does not state its preprocessing is taken to have that of the slim file.
    own = preprocessing
    if not _is_bare(loaded):
        with _options_of_teacher():
            own = resolve_preprocessing(loaded, options.preprocessing)
    if loaded.header is not None and loaded.header.config is not None:
        own = replace(own, input_size=preprocessing.input_size)  # a folder's model may take other sizes too
    if own.input_size != preprocessing.input_size:
        raise CheckpointError(
            f"{option_name('teacher', loaded.source)}: takes images of {_shape(own)}, the slim model of "
            f"{_shape(preprocessing)}; give a teacher for images of that size"
        )
    return own


def _shape(images: Preprocessing) -> str:
    return "x".join(map(str, images.input_size))


@contextmanager
def _options_of_teacher() -> Iterator[None]:
    """Let messages about a checkpoint name the options of the teacher, until the block is left."""

    def write(name: str, *value: object) -> str:
        if name == "num_classes":  # an argument of the model: the teacher has no option for it
            return before(_OPTIONS["model_args"], {name: value[0] if value else "N"})
        return before(_OPTIONS.get(name, name), *value)

    with options_written_by(write) as before:
        yield


@_options_of_teacher()
def _read_teacher(teacher: PathLike, options: FinetuneOptions, slim: Checkpoint) -> Checkpoint:
    """Read the teacher; a file that does not state its architecture is the slim file's dense model."""
    teaching = options.teaching
    model, args = teaching.teacher_model, dict(teaching.teacher_model_args)
    part = teaching.teacher_part
    if model is None and not states_its_model(teacher, part):
        model = slim.identity.architecture
        args = {**dense_args(slim.identity), **args}
    return read_model(teacher, model=model, model_args=args or None, part=part)


def _is_bare(loaded: Checkpoint) -> bool:
    """Whether the teacher is a file alone, which does not state its model."""
    return loaded.record is None and loaded.header is not None and loaded.header.config is None


def _first_source(loaded: Checkpoint) -> object:
    """Digest of the dense file, as the slim file's history states it."""
    history = record_of(loaded).history
    return history[0].get("source_sha256") if history else None
