"""Options of ``mhacut finetune``; where timm has a name for something, it is timm's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mhacut.errors import option_name
from mhacut.options.base import (
    HIGHEST_RATE,
    REQUIRED,
    DataOptions,
    DeviceOptions,
    PreprocessingOptions,
    seed_option,
)
from mhacut.options.option import GIVEN, Options, PathLike, option, require

Schedule = Literal["cosine", "poly", "step", "tanh", "constant"]
Dtype = Literal["float32", "bfloat16", "float16"]
AmpDtype = Literal["bfloat16", "float16"]
ClipMode = Literal["norm", "value", "agc"]
EraseMode = Literal["const", "rand", "pixel"]
_MIXES = {"mixup": GIVEN, "cutmix": GIVEN}


@dataclass(frozen=True, kw_only=True)
class TeacherOptions(Options, panel="Teacher", needs={"teacher": GIVEN}):
    """Teacher that the model learns from besides labels."""

    teacher: PathLike | None = option(None, metavar="CHECKPOINT", reads="checkpoint")
    """Checkpoint of the dense model, or of any model with the same classes, to learn from; labels are then
    optional. By default the dense model, where it lies beside SLIM or in the working directory."""
    find_teacher: bool = option(True, needs={})
    """Look for the dense model; off: learn from labels alone."""
    label_weight: float = option(1.0, at_least=0)
    """Weight of the cross-entropy with labels relative to the distillation loss."""
    teacher_model: str | None = None
    """timm architecture of the teacher, if its file does not state it; by default that of the dense model."""
    teacher_model_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of that architecture."""
    teacher_part: str | None = None
    """Part of a training checkpoint that holds the teacher: state_dict, student, backbone, ..."""
    kd_temperature: float = option(1.0, above=0)
    """Temperature that divides the logits of both models before they are compared."""
    feature_weight: float = option(0.0, at_least=0)
    """Weight of the squared error between the blocks' outputs, relative to their variance."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options, panel="Training"):
    """Training of the weights."""

    epochs: int = option(10, at_least=1)
    """Passes over the training images."""
    steps: int | None = option(None, at_least=1)
    """Optimiser steps in all, instead of epochs."""
    batch_size: int | None = option(None, at_least=1)
    """Images per batch and process; by default 64, or 16 where epochs have fewer than 1,000 such steps."""
    grad_accum_steps: int = option(1, at_least=1)
    """Batches per optimiser step."""
    opt: str = "adamw"
    """Optimiser, by its name in timm."""
    lr: float | None = option(None, above=0, at_most=HIGHEST_RATE)
    """Highest learning rate; by default the first of 3e-4, 1e-4, 3e-5 and 1e-5 of which a trial of 25 steps
    raises the loss on held-out training images by no more than a fifth."""
    weight_decay: float = option(0.05, at_least=0)
    """Weight decay; not applied to biases, norms and the parameters that the model exempts."""
    sched: Schedule = "cosine"
    """Learning rate schedule."""
    warmup_epochs: float | None = option(None, at_least=0)
    """Epochs of warmup, in which the learning rate rises; by default a tenth of the run."""
    clip_grad: float | None = option(1.0, at_least=0)
    """Largest norm of the gradient; 0 for no limit."""
    model_ema: bool = False
    """Evaluate and save a moving average of the weights."""
    momentum: float = option(0.9, at_least=0)
    """Momentum, for optimisers that have it."""
    layer_decay: float | None = option(None, above=0, at_most=1)
    """Factor by which the learning rate falls from each layer to the one before it."""
    drop_path: float = option(0.0, at_least=0, below=1)
    """Stochastic depth rate of the last block; earlier blocks have lower rates."""
    warmup_lr: float = option(1e-6, at_least=0, at_most=HIGHEST_RATE)
    """Learning rate at the start of the warmup."""
    min_lr: float = option(1e-6, at_least=0, at_most=HIGHEST_RATE)
    """Learning rate at the end of the schedule."""
    decay_epochs: float = option(30.0, above=0, needs={"sched": "step"})
    """Epochs between decays of the step schedule."""
    decay_rate: float = option(0.1, above=0)
    """Factor of each decay of the step schedule; power of the poly schedule."""
    clip_mode: ClipMode = option("norm", needs={"clip_grad": GIVEN})
    """Gradient clipping by norm, by value, or adaptive."""
    model_ema_decay: float = option(0.9998, above=0, below=1, needs={"model_ema": True})
    """Decay of the moving average, per step."""
    model_ema_warmup: bool = option(True, needs={"model_ema": True})
    """Let the moving average forget faster at the start."""
    seed: int = seed_option()
    """Random seed."""


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions(Options, panel="Augmentation"):
    """Variation of training images by timm's transforms; validation images are never varied."""

    aug: bool = True
    """Augment training images; off: they are preprocessed as for validation, and only mixup and cutmix change
    them."""
    aa: str | None = option(None, metavar="POLICY", needs={"aug": True})
    """AutoAugment policy, rand-m9-mstd0.5-inc1."""
    mixup: float = option(0.0, at_least=0)
    """Alpha of mixup; 0 for none."""
    cutmix: float = option(0.0, at_least=0)
    """Alpha of cutmix; 0 for none."""
    mixup_prob: float = option(1.0, at_least=0, at_most=1, needs=_MIXES)
    """Probability that mixup or cutmix is applied in a step."""
    mixup_switch_prob: float = option(0.5, at_least=0, at_most=1, needs=_MIXES)
    """Probability of cutmix rather than mixup, if both are on."""
    smoothing: float = option(0.0, at_least=0, below=1)
    """Label smoothing."""
    scale: tuple[float, ...] = option((0.5, 1.0), above=0, at_most=1, needs={"aug": True})
    """Smallest and largest share of the area that a random crop keeps."""
    ratio: tuple[float, ...] = option((0.75, 4 / 3), above=0, at_most=100, needs={"aug": True})
    """Smallest and largest aspect ratio of a random crop."""
    hflip: float = option(0.5, at_least=0, at_most=1, needs={"aug": True})
    """Probability of a horizontal flip; use 0 if left and right mean different things."""
    vflip: float = option(0.0, at_least=0, at_most=1, needs={"aug": True})
    """Probability of a vertical flip."""
    color_jitter: float = option(0.0, at_least=0, needs={"aug": True})
    """Strength of changes of brightness, contrast and saturation; unused with an AutoAugment policy."""
    reprob: float = option(0.0, at_least=0, at_most=1, needs={"aug": True})
    """Probability of erasing a rectangle."""
    remode: EraseMode = option("pixel", needs={"reprob": GIVEN})
    """Contents of an erased rectangle."""
    recount: int = option(1, at_least=1, needs={"reprob": GIVEN})
    """Largest number of erased rectangles per image."""
    train_interpolation: str | None = option(None, needs={"aug": True})
    """Interpolation of random crops; by default the model's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("scale", "ratio"):
            value = getattr(self, name)
            require(name, value, len(value) == 2 and value[0] <= value[1], "the smallest, then the largest")


@dataclass(frozen=True, kw_only=True)
class FinetuneKeywords(
    TeacherOptions,
    DataOptions,
    TrainingOptions,
    AugmentationOptions,
    PreprocessingOptions,
    DeviceOptions,
    panel="Result",
):
    """Keywords of :func:`mhacut.finetune`."""

    output: PathLike | None = option(None, metavar="DIR")
    """Directory of the run; by default the file's name without its ending, plus -finetuned, in the working
    directory."""
    overwrite: bool = False
    """Start again in a directory that already holds a run, which is moved to the directory old in it."""
    resume: PathLike | None = option(None, metavar="DIR")
    """Continue the run in this directory, with the options it was started with; more epochs or steps
    prolong a finished one."""
    save_every: int = option(0, at_least=0)
    """Steps between saves within an epoch; 0 saves only at the end of each epoch."""
    labels: bool = option(True, panel="Data")
    """Learn from labels if there are any; off: from the teacher alone. Accuracy is measured either way."""
    eval_images: int | None = option(None, at_least=0, panel="Data")
    """Validation images to measure accuracy on; all by default, 0 for none."""
    amp: bool = option(False, panel="Computing")
    """Train in mixed precision; accuracy is measured in float32."""
    amp_dtype: AmpDtype = option("bfloat16", panel="Computing", needs={"amp": True})
    """Type of mixed precision; float16 needs CUDA."""
    compile: bool = option(False, panel="Computing")
    """Compile the model with torch.compile."""
    grad_checkpointing: bool = option(False, panel="Computing")
    """Recompute activations in the backward pass to save memory."""
    channels_last: bool = option(False, panel="Computing")
    """Use the channels-last memory format, for convolutions."""
    log: str | None = None
    """Logs to write besides summary.csv: tensorboard, wandb, or both, separated by a comma."""
    dtype: Dtype | None = None
    """Precision of the weights that are written; by default the slim file's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for log in self.logs:
            known = ("tensorboard", "wandb")
            require("log", log, log in known, "one of " + ", ".join(known))
        # timm mixes each image with the one at the mirrored place of the batch; none may be left over.
        even = (self.batch_size or 64) % 2 == 0 or not (self.mixup or self.cutmix)
        expected = f"an even number with {option_name('mixup')} or {option_name('cutmix')}"
        require("batch_size", self.batch_size, even, expected)

    @property
    def logs(self) -> tuple[str, ...]:
        """Names in ``log``."""
        return tuple(name.strip() for name in self.log.split(",")) if self.log else ()


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(FinetuneKeywords, panel="Arguments"):
    """Options of ``mhacut finetune``."""

    checkpoint: PathLike = option(REQUIRED, metavar="SLIM", reads="checkpoint")
    """A slim file, as mhacut prune writes it."""
