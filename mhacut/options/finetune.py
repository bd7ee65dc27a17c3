"""Options of ``mhacut finetune``; where timm has a name for something, it is timm's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mhacut.errors import option_name
from mhacut.options.augmentation import AugmentationOptions
from mhacut.options.base import (
    DataOptions,
    DeviceOptions,
    PathLike,
    PreprocessingOptions,
    rate_option,
    seed_option,
)
from mhacut.options.option import REQUIRED, Options, option, require

Schedule = Literal["cosine", "poly", "step", "tanh", "constant"]
Dtype = Literal["float32", "bfloat16", "float16"]
AmpDtype = Literal["bfloat16", "float16"]
ClipMode = Literal["norm", "value", "agc"]


@dataclass(frozen=True, kw_only=True)
class TeacherOptions(Options):
    """Teacher that the model learns from besides labels."""

    teacher: PathLike | None = option(
        None,
        "Checkpoint of the dense model, or of any model with the same classes, to learn from; labels are "
        "then optional.",
        panel="Teacher",
        metavar="CHECKPOINT",
        reads="checkpoint",
    )
    teacher_model: str | None = option(
        None,
        "timm architecture of the teacher, if its file does not state it; by default that of the dense "
        "model.",
        panel="Rarer options",
        metavar="NAME",
    )
    teacher_model_args: Mapping[str, Any] = option(
        {}, "Arguments of that architecture.", panel="Rarer options", metavar="KEY=VALUE"
    )
    teacher_part: str | None = option(
        None,
        "Part of a training checkpoint that holds the teacher: state_dict, student, backbone, ...",
        panel="Rarer options",
        metavar="NAME",
    )
    label_weight: float = option(
        0.1,
        "Weight of the cross-entropy with labels relative to the distillation loss; 1 without a teacher.",
        panel="Teacher",
        metavar="WEIGHT",
        at_least=0,
    )
    kd_temperature: float = option(
        1.0,
        "Temperature that divides the logits of both models before they are compared.",
        panel="Rarer options",
        metavar="T",
        above=0,
    )
    feature_weight: float = option(
        0.0,
        "Weight of the squared error between the blocks' outputs, relative to their variance.",
        panel="Rarer options",
        metavar="WEIGHT",
        at_least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = self.feature_weight == 0 or self.teacher is not None
        expected = f"a {option_name('teacher')}, whose features are matched"
        require("feature_weight", self.feature_weight, wanted, expected)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """Training of the weights."""

    epochs: int = option(10, "Passes over the training images.", panel="Training", metavar="N", at_least=1)
    steps: int | None = option(
        None, "Optimiser steps in all, instead of epochs.", panel="Training", metavar="N", at_least=1
    )
    batch_size: int = option(
        64, "Images per batch and process.", panel="Training", metavar="N", short="-b", at_least=1
    )
    grad_accum_steps: int = option(
        1, "Batches per optimiser step.", panel="Training", metavar="N", at_least=1
    )
    opt: str = option("adamw", "Optimiser, by its name in timm.", panel="Training", metavar="NAME")
    lr: float = rate_option(1e-4, "Highest learning rate.", panel="Training")
    weight_decay: float = option(
        0.05,
        "Weight decay; not applied to biases, norms and the parameters that the model exempts.",
        panel="Training",
        metavar="RATE",
        at_least=0,
    )
    sched: Schedule = option("cosine", "Learning rate schedule.", panel="Training")
    warmup_epochs: float = option(
        0.0, "Epochs of warmup, in which the learning rate rises.", panel="Training", metavar="N", at_least=0
    )
    clip_grad: float | None = option(
        1.0, "Largest norm of the gradient; 0 for no limit.", panel="Training", metavar="NORM", at_least=0
    )
    model_ema: bool = option(False, "Evaluate and save a moving average of the weights.", panel="Training")
    seed: int = seed_option("Random seed.", panel="Training")
    momentum: float = option(
        0.9, "Momentum, for optimisers that have it.", panel="Rarer options", metavar="M", at_least=0
    )
    layer_decay: float | None = option(
        None,
        "Factor by which the learning rate falls from each layer to the one before it.",
        panel="Rarer options",
        metavar="FACTOR",
        above=0,
        at_most=1,
    )
    drop_path: float = option(
        0.0,
        "Stochastic depth rate of the last block; earlier blocks have lower rates.",
        panel="Rarer options",
        metavar="RATE",
        at_least=0,
        below=1,
    )
    warmup_lr: float = rate_option(
        1e-6, "Learning rate at the start of the warmup.", panel="Rarer options", or_zero=True
    )
    min_lr: float = rate_option(
        1e-6, "Learning rate at the end of the schedule.", panel="Rarer options", or_zero=True
    )
    decay_epochs: float = option(
        30.0, "Epochs between decays of the step schedule.", panel="Rarer options", metavar="N", above=0
    )
    decay_rate: float = option(
        0.1,
        "Factor of each decay of the step schedule; power of the poly schedule.",
        panel="Rarer options",
        metavar="FACTOR",
        above=0,
    )
    clip_mode: ClipMode = option(
        "norm",
        "Gradient clipping by norm, by value, or adaptive.",
        panel="Rarer options",
    )
    model_ema_decay: float = option(
        0.9998,
        "Decay of the moving average, per step.",
        panel="Rarer options",
        metavar="DECAY",
        above=0,
        below=1,
    )
    model_ema_warmup: bool = option(
        True, "Let the moving average forget faster at the start.", panel="Rarer options"
    )

    def idle(self) -> dict[str, str]:
        """Names of options that would have no effect if they were changed, each with the reason."""
        found: dict[str, str] = {}
        shape = option_name("sched", self.sched)
        if self.sched != "step":
            found["decay_epochs"] = f"{shape} does not decay in steps"
        if self.sched not in ("step", "poly"):
            found["decay_rate"] = f"{shape} has no such factor"
        if self.sched in ("step", "constant"):
            found["min_lr"] = f"{shape} has no lowest rate"
        if self.warmup_epochs == 0:
            found["warmup_lr"] = f"there is no warmup without {option_name('warmup_epochs')}"
        if self.opt == "adamw":
            found["momentum"] = f"{option_name('opt', self.opt)} has none"
        if not self.clip_grad:
            found["clip_mode"] = f"{option_name('clip_grad', self.clip_grad)} clips nothing"
        if not self.model_ema:
            averaged = f"there is no average without {option_name('model_ema', True)}"
            found |= dict.fromkeys(("model_ema_decay", "model_ema_warmup"), averaged)
        return found


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(DeviceOptions):
    """Options of ``mhacut finetune``."""

    checkpoint: PathLike = option(
        REQUIRED,
        "A slim file, as mhacut prune writes it.",
        panel="Arguments",
        metavar="SLIM",
        reads="checkpoint",
    )
    output: PathLike | None = option(
        None,
        "Directory of the run; by default the file's name without its ending, plus -finetuned, in the "
        "working directory.",
        panel="Result",
        metavar="DIR",
        short="-o",
    )
    overwrite: bool = option(
        False,
        "Start again in a directory that already holds a run, which stays until the new one is first "
        "saved; the slim file is never replaced.",
        panel="Result",
    )
    resume: PathLike | None = option(
        None,
        "Continue the run in this directory, with the options it was started with.",
        panel="Result",
        metavar="DIR",
    )
    save_every: int = option(
        0,
        "Steps between saves within an epoch; 0 saves only at the end of each epoch.",
        panel="Result",
        metavar="N",
        at_least=0,
    )
    teaching: TeacherOptions = field(default_factory=TeacherOptions)
    data: DataOptions = field(default_factory=DataOptions)
    labels: bool = option(
        True,
        "Learn from labels if there are any; off: from the teacher alone. Accuracy is measured either way.",
        panel="Data",
    )
    eval_images: int | None = option(
        None,
        "Validation images to measure accuracy on; all by default, 0 for none.",
        panel="Data",
        metavar="N",
        at_least=0,
    )
    training: TrainingOptions = field(default_factory=TrainingOptions)
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)
    amp: bool = option(False, "Train in mixed precision; accuracy is measured in float32.", panel="Computing")
    compile: bool = option(False, "Compile the model with torch.compile.", panel="Computing")
    log: str | None = option(
        None,
        "Logs to write besides summary.csv: png, tensorboard or wandb, or several, separated by commas.",
        panel="Computing",
        metavar="NAME",
    )
    dtype: Dtype | None = option(
        None, "Precision of the weights that are written; by default the slim file's.", panel="Rarer options"
    )
    amp_dtype: AmpDtype = option(
        "bfloat16", "Type of mixed precision; float16 needs CUDA.", panel="Rarer options"
    )
    grad_checkpointing: bool = option(
        False, "Recompute activations in the backward pass to save memory.", panel="Rarer options"
    )
    channels_last: bool = option(
        False, "Use the channels-last memory format, for convolutions.", panel="Rarer options"
    )
    deterministic: bool = option(
        False,
        "Refuse CUDA kernels that sum in random order; runs on the CPU are always repeatable.",
        panel="Rarer options",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for log in self.logs:
            known = ("png", "tensorboard", "wandb")
            require("log", log, log in known, "one of " + ", ".join(known))
        taught = self.teaching.teacher is not None
        expected = f"a {option_name('teacher')}, which needs no labels"
        require("labels", self.labels, self.labels or taught, expected)
        mixes = self.augmentation.mixup > 0 or self.augmentation.cutmix > 0
        even = not mixes or self.training.batch_size % 2 == 0
        expected = f"an even number with {option_name('mixup')} or {option_name('cutmix')}"
        require("batch_size", self.training.batch_size, even, expected)

    def idle(self) -> dict[str, str]:
        """Names of options that were changed to no effect, each with the reason."""
        training = self.training
        found: dict[str, str] = {}
        if self.teaching.teacher is None:
            found |= dict.fromkeys(self.teaching.options(), "there is no teacher")
        elif not self.labels:
            found |= dict.fromkeys(("label_weight", "smoothing"), f"{option_name('labels', False)} uses none")
        elif self.teaching.label_weight == 0:
            found["smoothing"] = f"{option_name('label_weight', 0)} uses no labels"
        if training.steps is not None:
            found["epochs"] = f"{option_name('steps')} says how long to train"
        found |= self.augmentation.idle() | training.idle()
        if not self.amp:
            found["amp_dtype"] = f"precision is mixed with {option_name('amp', True)} only"
        return {name: reason for name, reason in found.items() if name in self.all_changed()}

    @property
    def logs(self) -> tuple[str, ...]:
        """Names in ``log``."""
        return tuple(name.strip() for name in self.log.split(",")) if self.log else ()
