"""Opening the teacher, and what the slim model is trained for with it or without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.load import read_model, states_its_model
from mhacut.checkpoint.preprocessing import resolve_preprocessing
from mhacut.data import Preprocessing
from mhacut.errors import CheckpointError
from mhacut.finetuning.history import record_of
from mhacut.finetuning.objective import Blocks, Objective, Teacher, check_matching
from mhacut.options.base import PathLike
from mhacut.options.finetune import FinetuneOptions
from mhacut.surgery.info import classifier_size


@dataclass(frozen=True)
class Lesson:
    """What a run trains for."""

    objective: Objective
    teacher_sha256: str | None
    """Of the teacher's file; None without one."""


def lesson_of(
    options: FinetuneOptions,
    slim: Checkpoint,
    student: nn.Module,
    preprocessing: Preprocessing,
    device: torch.device,
    tell: Callable[[str], None],
) -> Lesson:
    """Open the teacher, if there is one, and make the objective.

    Args:
        options: of the run.
        slim: the slim file.
        student: its model, on ``device``.
        preprocessing: of its images.
        device: where to compute.
        tell: called with what is worth knowing of the teacher.

    Raises:
        CheckpointError: the teacher has other classes or takes images of another size.
        UsageError: features are to be matched, and its blocks are others.
    """
    teaching = options.teaching
    matched = teaching.feature_weight > 0
    classes = classifier_size(student)
    teacher, sha256 = None, None
    if teaching.teacher is not None:
        loaded = _read_teacher(teaching.teacher, options, slim)
        own = _checked_preprocessing(loaded, options, slim, classes, preprocessing)
        if loaded.sha256 != _first_source(slim):
            tell("the teacher is not the file that the slim model was cut from")
        _check_runs(loaded, preprocessing)
        mean = [torch.tensor(images.mean, device=device) for images in (preprocessing, own)]
        std = [torch.tensor(images.std, device=device) for images in (preprocessing, own)]
        teacher, sha256 = Teacher(loaded.model.to(device), mean, std, matched), loaded.sha256
    blocks = Blocks(student) if matched else None
    if blocks is not None and teacher is not None and teacher.blocks is not None:
        check_matching(blocks, teacher.blocks)
    objective = Objective(
        teacher=teacher,
        student=blocks,
        label_weight=teaching.label_weight if teacher is not None else 1.0,
        temperature=teaching.kd_temperature,
        feature_weight=teaching.feature_weight,
        smoothing=options.augmentation.smoothing,
        classes=classes,
    )
    return Lesson(objective, sha256)


@torch.no_grad()
def _check_runs(teacher: Checkpoint, preprocessing: Preprocessing) -> None:
    """Not every model that is bound to one size of images says so."""
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
    """The teacher's own, refused together with its classes where they do not fit the slim model's."""
    found = classifier_size(loaded.model)
    if found != classes:
        raise CheckpointError(f"--teacher {loaded.source}: has {found} classes, the slim model {classes}")
    # A file that says nothing of its images was fed as the slim file states.
    own = preprocessing if _is_bare(loaded) else resolve_preprocessing(loaded, options.preprocessing)
    if own.input_size != preprocessing.input_size:
        raise CheckpointError(
            f"--teacher {loaded.source}: takes images of {own.input_size}, the slim model of "
            f"{preprocessing.input_size}; both see the same images"
        )
    return own


def _read_teacher(teacher: PathLike, options: FinetuneOptions, slim: Checkpoint) -> Checkpoint:
    """The teacher; a file that does not say what it is is the dense model the slim one was cut from."""
    teaching = options.teaching
    model, args = teaching.teacher_model, dict(teaching.teacher_model_args)
    if model is None and not states_its_model(teacher):
        model = slim.identity.architecture
        args = {key: value for key, value in slim.identity.model_args.items() if key != "num_classes"}
    return read_model(teacher, model=model, model_args=args or None)


def _is_bare(loaded: Checkpoint) -> bool:
    return loaded.path is not None and not states_its_model(loaded.path)


def _first_source(loaded: Checkpoint) -> object:
    """sha256 of the dense file, as a slim file's history states it."""
    history = record_of(loaded).history
    return history[0].get("source_sha256") if history else None
