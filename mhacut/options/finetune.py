"""Options of ``mhacut finetune``. Names are those of timm's train.py."""

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
    teacher: PathLike | None = option(None, metavar="CHECKPOINT", reads="checkpoint")
    """Checkpoint of the teacher for distillation: the unpruned (dense) model, or another model with the same
    classes. Default: the dense model, if its file is next to the slim file or in the working directory."""
    find_teacher: bool = option(True, needs={}, off="Learn from labels only: look for no teacher.")
    """Look for the unpruned (dense) model's file, and use it as the teacher for distillation."""
    label_weight: float = option(1.0, at_least=0)
    """Weight of the cross-entropy with labels, relative to the distillation loss."""
    teacher_model: str | None = None
    """timm architecture of the teacher. Default: as named in the teacher's checkpoint, or the dense
    model's."""
    teacher_model_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for building the teacher's timm architecture, such as img_size=32."""
    teacher_part: str | None = None
    """Entry of the teacher's training checkpoint that holds the model's weights, such as state_dict or
    student."""
    kd_temperature: float = option(1.0, above=0)
    """Distillation temperature, by which the logits of teacher and student are divided."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options, panel="Training"):
    epochs: int = option(10, at_least=1)
    """Number of training epochs."""
    steps: int | None = option(None, at_least=1)
    """Number of optimizer steps. Replaces the number of epochs."""
    batch_size: int | None = option(None, at_least=1)
    """Batch size per process. Default: 64, or 16 if a run with 64 has fewer than 1,000 optimizer steps."""
    grad_accum_steps: int = option(1, at_least=1)
    """Number of batches per optimizer step (gradient accumulation)."""
    opt: str = "adamw"
    """Optimizer, by its name in timm."""
    lr: float | None = option(None, above=0, at_most=HIGHEST_RATE)
    """Peak learning rate. Default: the largest of 3e-4, 1e-4, 3e-5 and 1e-5 that raises the loss on held-out
    images by at most 20 % in a trial of 25 steps."""
    weight_decay: float = option(0.05, at_least=0)
    """Weight decay. Biases, normalisation layers and parameters that the timm model exempts are not
    decayed."""
    sched: Schedule = "cosine"
    """Learning rate schedule."""
    warmup_epochs: float | None = option(None, at_least=0)
    """Number of epochs of learning rate warmup. Default: 10 % of all epochs."""
    clip_grad: float | None = option(1.0, at_least=0)
    """Gradient clipping threshold; 0 turns clipping off."""
    model_ema: bool = False
    """Evaluate and save an exponential moving average (EMA) of the weights."""
    momentum: float = option(0.9, at_least=0)
    """Momentum of optimizers such as sgd."""
    layer_decay: float | None = option(None, above=0, at_most=1)
    """Layer-wise learning rate decay: the learning rate of a layer is this factor times the learning rate of
    the next layer."""
    drop_path: float = option(0.0, at_least=0, below=1)
    """Stochastic depth rate of the last block. Earlier blocks have lower rates."""
    warmup_lr: float = option(1e-6, at_least=0, at_most=HIGHEST_RATE)
    """Learning rate at the start of the warmup."""
    min_lr: float = option(1e-6, at_least=0, at_most=HIGHEST_RATE)
    """Learning rate at the end of the schedule."""
    decay_epochs: float = option(30.0, above=0, needs={"sched": "step"})
    """Number of epochs between decays of the learning rate (step schedule)."""
    decay_rate: float = option(0.1, above=0)
    """Decay factor of the step schedule, and power of the poly schedule."""
    clip_mode: ClipMode = option("norm", needs={"clip_grad": GIVEN})
    """Type of gradient clipping: by norm (norm), by value (value), or adaptive (agc)."""
    model_ema_decay: float = option(0.9998, above=0, below=1, needs={"model_ema": True})
    """Decay per step of the exponential moving average (EMA) of the weights."""
    model_ema_warmup: bool = option(
        True,
        needs={"model_ema": True},
        off="Use the full decay of the averaged weights (EMA) from the start.",
    )
    """Start the exponential moving average (EMA) of the weights with a smaller decay."""
    seed: int = seed_option()
    """Random seed."""


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions(Options, panel="Augmentation"):
    aug: bool = option(
        True, off="Preprocess training images as for validation. Mixup and CutMix still apply."
    )
    """Augment training images."""
    aa: str | None = option(None, metavar="POLICY", needs={"aug": True})
    """AutoAugment policy, such as rand-m9-mstd0.5-inc1."""
    mixup: float = option(0.0, at_least=0)
    """Alpha of mixup, the parameter of its beta distribution; 0 turns mixup off."""
    cutmix: float = option(0.0, at_least=0)
    """Alpha of CutMix, the parameter of its beta distribution; 0 turns CutMix off."""
    mixup_prob: float = option(1.0, at_least=0, at_most=1, needs=_MIXES)
    """Probability that a training step uses mixup or CutMix."""
    mixup_switch_prob: float = option(0.5, at_least=0, at_most=1, needs=_MIXES)
    """Probability that a training step uses CutMix instead of mixup, if both are on."""
    smoothing: float = option(0.0, at_least=0, below=1)
    """Label smoothing: probability that is spread over all classes."""
    scale: tuple[float, ...] = option((0.5, 1.0), above=0, at_most=1, needs={"aug": True})
    """Smallest and largest area of a random crop, as a fraction of the image."""
    ratio: tuple[float, ...] = option((0.75, 4 / 3), above=0, at_most=100, needs={"aug": True})
    """Smallest and largest aspect ratio of a random crop."""
    hflip: float = option(0.5, at_least=0, at_most=1, needs={"aug": True})
    """Probability of a horizontal flip. Use 0 if left and right mean different things."""
    vflip: float = option(0.0, at_least=0, at_most=1, needs={"aug": True})
    """Probability of a vertical flip."""
    color_jitter: float = option(0.0, at_least=0, needs={"aug": True})
    """Strength of colour jitter (brightness, contrast, saturation). AutoAugment policies ignore it."""
    reprob: float = option(0.0, at_least=0, at_most=1, needs={"aug": True})
    """Probability of random erasing."""
    remode: EraseMode = option("pixel", needs={"reprob": GIVEN})
    """Fill of the rectangles in random erasing: zeros (const), 1 random colour (rand) or random pixels
    (pixel)."""
    recount: int = option(1, at_least=1, needs={"reprob": GIVEN})
    """Largest number of rectangles that random erasing fills per image."""
    train_interpolation: str | None = option(None, needs={"aug": True})
    """Interpolation for resizing random crops of training images. Default: set by the checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("scale", "ratio"):
            value = getattr(self, name)
            require(name, value, len(value) == 2 and value[0] <= value[1], "2 numbers, the smaller first")


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(
    TeacherOptions,
    DataOptions,
    TrainingOptions,
    AugmentationOptions,
    PreprocessingOptions,
    DeviceOptions,
    panel="Result",
):
    checkpoint: PathLike = option(REQUIRED, panel="Arguments", metavar="SLIM", reads="checkpoint")
    """Slim file to fine-tune, written by mhacut prune."""
    output: PathLike | None = option(None, metavar="DIR")
    """Folder for the files of the run. Default: the slim file's name plus -finetuned, in the working
    directory."""
    overwrite: bool = False
    """Replace an earlier run in the output folder."""
    resume: PathLike | None = option(None, metavar="DIR")
    """Folder of an interrupted run. The run continues with its original options."""
    save_every: int = option(0, at_least=0)
    """Number of optimizer steps between saves. 0 saves at the end of each epoch only."""
    labels: bool = option(True, panel="Data", off="Learn from the teacher only.")
    """Learn from labels in addition to the teacher. If off, labels are used to measure accuracy only."""
    eval_images: int | None = option(None, at_least=0, panel="Data")
    """Number of validation images. Default: all; 0 turns validation off."""
    amp: bool = option(False, panel="Computing")
    """Train in mixed precision. Accuracy is measured in float32."""
    amp_dtype: AmpDtype = option("bfloat16", panel="Computing", needs={"amp": True})
    """Number format of mixed precision. float16 needs CUDA."""
    compile: bool = option(False, panel="Computing")
    """Compile the model with torch.compile."""
    grad_checkpointing: bool = option(False, panel="Computing")
    """Save memory by recomputing activations in the backward pass."""
    channels_last: bool = option(False, panel="Computing")
    """Use the channels-last memory format."""
    log: str | None = None
    """Logs to write in addition to summary.csv: tensorboard, wandb, or tensorboard,wandb."""
    dtype: Dtype | None = None
    """Precision of the saved weights. Default: the slim file's precision."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for log in self.logs:
            known = ("tensorboard", "wandb")
            require("log", log, log in known, "one of " + ", ".join(known))
        # timm mixes image i with image N-1-i of the batch, so N must be even.
        even = (self.batch_size or 64) % 2 == 0 or not (self.mixup or self.cutmix)
        expected = f"an even number with {option_name('mixup')} or {option_name('cutmix')}"
        require("batch_size", self.batch_size, even, expected)

    @property
    def logs(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.log.split(",")) if self.log else ()
