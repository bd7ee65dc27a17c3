"""The options of ``mhacut finetune``; where timm has a name for something, it is timm's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mhacut.options.base import DataOptions, Flat, PathLike, PreprocessingOptions, require, require_choice

Schedule = Literal["cosine", "poly", "step", "tanh", "constant"]
Dtype = Literal["float32", "bfloat16", "float16"]
AmpDtype = Literal["bfloat16", "float16"]
ClipMode = Literal["norm", "value", "agc"]
EraseMode = Literal["const", "rand", "pixel"]
_FINITE = float("inf")


@dataclass(frozen=True)
class TeacherOptions:
    """What the model learns from besides labels."""

    teacher: PathLike | None = None
    """Checkpoint of the dense model, or of any with the same classes; None learns from labels alone."""
    teacher_model: str | None = None
    """timm architecture of a bare teacher file; by default that of the dense model the slim one came from."""
    teacher_model_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for that architecture."""
    label_weight: float = 0.1
    """Weight of the cross-entropy with labels beside the teacher's divergence; 1 without a teacher."""
    kd_temperature: float = 1.0
    """Both outputs are divided by it before they are compared."""
    feature_weight: float = 0.0
    """Weight of the squared error between the blocks' outputs, relative to their variance."""

    def __post_init__(self) -> None:
        for flag, value in (("--label-weight", self.label_weight), ("--feature-weight", self.feature_weight)):
            require(flag, value, 0 <= value < _FINITE, "at least 0")
        require("--kd-temperature", self.kd_temperature, 0 < self.kd_temperature < _FINITE, "above 0")
        wanted = self.feature_weight == 0 or self.teacher is not None
        require("--feature-weight", self.feature_weight, wanted, "a --teacher, whose features are matched")


@dataclass(frozen=True)
class AugmentationOptions:
    """How training images are varied, by timm's transforms; validation images never are."""

    aug: bool = True
    """Vary images at all; off, they are prepared as for validation, and only mixup and cutmix act."""
    scale: tuple[float, ...] = (0.5, 1.0)
    """Smallest and largest share of the area that a random crop keeps."""
    ratio: tuple[float, ...] = (0.75, 4 / 3)
    """Smallest and largest aspect ratio of a random crop."""
    hflip: float = 0.5
    """Probability of a horizontal flip; 0 where left and right mean something."""
    vflip: float = 0.0
    """Probability of a vertical flip."""
    color_jitter: float = 0.0
    """Strength of changes of brightness, contrast and saturation; unused with ``aa``."""
    aa: str | None = None
    """AutoAugment policy as timm writes it: ``rand-m9-mstd0.5-inc1``."""
    reprob: float = 0.0
    """Probability of erasing a rectangle."""
    remode: EraseMode = "pixel"
    """What it is filled with."""
    recount: int = 1
    """Rectangles per image at most."""
    mixup: float = 0.0
    """Alpha of mixup; 0 for none."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0 for none."""
    mixup_prob: float = 1.0
    """Probability that the batch of a step is mixed, if either is on."""
    mixup_switch_prob: float = 0.5
    """Probability of cutmix rather than mixup, if both are on."""
    smoothing: float = 0.0
    """Label smoothing."""
    train_interpolation: str | None = None
    """Of random crops; by default the model's own."""

    def __post_init__(self) -> None:
        for name in ("hflip", "vflip", "reprob", "mixup_prob", "mixup_switch_prob"):
            value = getattr(self, name)
            require(_flag(name), value, 0 <= value <= 1, "a probability, 0 to 1")
        for name in ("color_jitter", "mixup", "cutmix"):
            value = getattr(self, name)
            require(_flag(name), value, 0 <= value < _FINITE, "at least 0")
        require("--smoothing", self.smoothing, 0 <= self.smoothing < 1, "at least 0, below 1")
        require("--recount", self.recount, self.recount >= 1, "at least 1")
        require_choice("--remode", self.remode, get_args(EraseMode))
        for name, most in (("scale", 1.0), ("ratio", 100.0)):
            value = getattr(self, name)
            ordered = len(value) == 2 and 0 < value[0] <= value[1] <= most
            shown = ",".join(map(str, value))
            require(_flag(name), shown, ordered, f"smallest,largest, above 0, at most {most:g}")


@dataclass(frozen=True)
class TrainingOptions:
    """How the weights are moved."""

    epochs: int = 10
    """Passes over the training images."""
    steps: int | None = None
    """Optimiser steps in all, in place of ``epochs``."""
    batch_size: int = 64
    """Images at a time, per process and gradient."""
    grad_accum_steps: int = 1
    """Batches whose gradients make one step."""
    opt: str = "adamw"
    """Optimiser, by its name in timm."""
    lr: float = 1e-4
    """Learning rate, at its highest."""
    momentum: float = 0.9
    """Of optimisers that have it."""
    weight_decay: float = 0.05
    """Not applied to biases, norms and what the model exempts."""
    sched: Schedule = "cosine"
    """Learning rate over the run."""
    warmup_epochs: float = 0.0
    """Epochs in which the learning rate rises to ``lr``."""
    warmup_lr: float = 1e-6
    """Where it rises from."""
    min_lr: float = 1e-6
    """Where it ends."""
    decay_epochs: float = 30.0
    """Epochs between decays of ``sched`` step."""
    decay_rate: float = 0.1
    """Factor of each decay of ``sched`` step; power of poly."""
    clip_grad: float | None = 1.0
    """Largest gradient, in the sense of ``clip_mode``; 0 for no limit."""
    clip_mode: ClipMode = "norm"
    """``norm``, ``value``, or ``agc``."""
    layer_decay: float | None = None
    """Factor on the learning rate from each layer to the one before it."""
    drop_path: float = 0.0
    """Stochastic depth of the last block; earlier ones have less."""
    model_ema: bool = False
    """Keep a moving average of the weights; it is what is measured and written."""
    model_ema_decay: float = 0.9998
    """Of that average, per step."""
    model_ema_warmup: bool = True
    """Let the average forget faster at the start."""
    seed: int = 42
    """Of everything random."""

    def __post_init__(self) -> None:
        require("--epochs", self.epochs, self.epochs >= 1, "at least 1")
        require("--steps", self.steps, self.steps is None or self.steps >= 1, "at least 1")
        require("--batch-size", self.batch_size, self.batch_size >= 1, "at least 1")
        require("--grad-accum-steps", self.grad_accum_steps, self.grad_accum_steps >= 1, "at least 1")
        for name in ("lr", "decay_epochs", "decay_rate"):
            value = getattr(self, name)
            require(_flag(name), value, 0 < value < _FINITE, "above 0")
        for name in ("weight_decay", "warmup_epochs", "warmup_lr", "min_lr", "momentum"):
            value = getattr(self, name)
            require(_flag(name), value, 0 <= value < _FINITE, "at least 0")
        clip = 0.0 if self.clip_grad is None else self.clip_grad
        require("--clip-grad", clip, 0 <= clip < _FINITE, "at least 0")
        decay = 1.0 if self.layer_decay is None else self.layer_decay
        require("--layer-decay", decay, 0 < decay <= 1, "above 0, at most 1")
        require("--drop-path", self.drop_path, 0 <= self.drop_path < 1, "at least 0, below 1")
        require("--model-ema-decay", self.model_ema_decay, 0 < self.model_ema_decay < 1, "between 0 and 1")
        require("--seed", self.seed, 0 <= self.seed < 2**32, "0 to 4294967295")
        require_choice("--sched", self.sched, get_args(Schedule))
        require_choice("--clip-mode", self.clip_mode, get_args(ClipMode))


@dataclass(frozen=True)
class FinetuneOptions(Flat):
    """Everything ``mhacut finetune`` can be told."""

    checkpoint: PathLike
    """A slim file."""
    output: PathLike | None = None
    """Directory of the run; None is ``<stem>-finetuned`` in the working directory."""
    overwrite: bool = False
    """Start anew in a directory that holds a run."""
    resume: PathLike | None = None
    """Directory of a run to go on with, with the options it was started with."""
    save_every: int = 0
    """Steps between saves within an epoch; 0 saves at the end of each."""
    dtype: Dtype | None = None
    """Of the weights that are written; None is what the slim file has. Training is in float32."""
    labels: bool = True
    """Use labels where there are any; off, the teacher alone teaches."""
    eval_images: int | None = None
    """At most so many validation images; None for all, 0 for none."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:N``."""
    amp: bool = False
    """Mixed precision."""
    amp_dtype: AmpDtype = "bfloat16"
    """Of mixed precision; float16 needs CUDA."""
    compile: bool = False
    """Compile the model with torch.compile."""
    channels_last: bool = False
    """Lay images out with channels last, for convolutions."""
    grad_checkpointing: bool = False
    """Compute activations twice to keep fewer."""
    deterministic: bool = False
    """Refuse CUDA kernels that sum in random order. CPUs always repeat."""
    log: str | None = None
    """Where the lines of ``summary.csv`` go as well: ``png``, ``tensorboard``, ``wandb``, or several with
    commas between."""
    data: DataOptions = field(default_factory=DataOptions)
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)
    teaching: TeacherOptions = field(default_factory=TeacherOptions)
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        require("--save-every", self.save_every, self.save_every >= 0, "at least 0")
        images = 0 if self.eval_images is None else self.eval_images
        require("--eval-images", images, images >= 0, "at least 0")
        dtype = "float32" if self.dtype is None else self.dtype
        require_choice("--dtype", dtype, get_args(Dtype))
        require_choice("--amp-dtype", self.amp_dtype, get_args(AmpDtype))
        for log in self.logs:
            require_choice("--log", log, ("png", "tensorboard", "wandb"))
        if not self.labels:
            taught = self.teaching.teacher is not None
            require("--no-labels", "", taught, "a --teacher, which needs no labels")
        mixes = self.augmentation.mixup > 0 or self.augmentation.cutmix > 0
        even = not mixes or self.training.batch_size % 2 == 0
        require("--batch-size", self.training.batch_size, even, "an even number with --mixup or --cutmix")

    @property
    def logs(self) -> tuple[str, ...]:
        """``log``, taken apart."""
        return tuple(name.strip() for name in self.log.split(",")) if self.log else ()


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
