"""Options of ``mhacut prune``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mhacut.budget import Budget
from mhacut.errors import UsageError, option_name
from mhacut.options.base import (
    HIGHEST_RATE,
    ArchitectureOptions,
    CheckpointOptions,
    DataOptions,
    DeviceOptions,
    PreprocessingOptions,
    TimingOptions,
    seed_option,
)
from mhacut.options.option import GIVEN, Options, PathLike, option, require

if TYPE_CHECKING:
    from typing_extensions import Self

Scope = Literal["auto", "attention", "attention+mlp", "attention+mlp+tokens"]
Init = Literal["attention-difference", "uniform"]
Selection = Literal["repair", "indicator"]
BasisChoice = Literal["auto", "channel", "principal"]
Positions = Literal["auto", "own", "equal"]
Allocation = Literal["curves", "indicator", "uniform"]
Method = Literal["mhacut", "paper"]
Effort = Literal["fast", "balanced", "best"]

UNREPAIRED_GAIN_STEPS = 40
"""Default number of training steps of the channel scales if weights are not refitted (``repair`` is off).
After a refit, the default is 0, because trained scales hardly help on other images."""
METHODS: Mapping[Method, Mapping[str, object]] = {
    "mhacut": {},
    "paper": {
        "scope": "attention+mlp",
        "allocation": "indicator",
        "selection": "indicator",
        "repair": False,
        "heal_steps": 0,
        "tuning_steps": 0,
    },
}
"""Default values of options that each ``--method`` sets."""
_INDICATORS = {"allocation": "indicator"}
_SCALES = {"gain_steps": GIVEN, "allocation": "indicator", "repair": False}
"""Option values that turn on the training of channel scales."""


@dataclass(frozen=True)
class Work:
    """Numbers of images and training steps that the option ``--effort`` sets."""

    calibration_images: int
    heal_steps: int
    tuning_steps: int
    replayed_images: int = 16
    """Number of images for measuring how sensitive each layer is to pruning."""


# docs/guides/prune.md has the accuracy, time and memory of each, docs/explanation/choices.md the reasons.
EFFORTS: Mapping[str, Work] = {
    "fast": Work(128, 0, 0, replayed_images=8),
    "balanced": Work(256, 40, 150),
    "best": Work(1024, 40, 1250),
}
BUDGETS, BOUNDS = ("flops", "params", "size", "max_latency"), ("max_kl", "max_drop")
OTHER_TARGETS = (*BUDGETS[1:], *BOUNDS, "exclude", "min_width", "equal_qkv")
"""Names of all options that set a target or a constraint, except ``flops``."""
_OTHERS = ("amp", "calibration_images", "int8", "keep_dead_tokens", "report", "round_to")
OF_TIMM = {
    *OTHER_TARGETS,
    *PreprocessingOptions.options(),
    *ArchitectureOptions.options(),
    "num_classes",
    "runtime",
    *_OTHERS,
}
"""Names of the options that work with timm models only, and not with ``--as huggingface``."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions(Options, panel="Research switches"):
    """Options of the search for each layer's width. The research switches turn off parts of the method."""

    effort: Effort = option("balanced", panel="Result")
    """Effort of search and training. A DeiT-S on 2 CPU cores takes about 1 min (fast), 1.5 to 8 min
    (balanced) or longer (best)."""
    batch_size: int = option(16, panel="Computing", at_least=1)
    """Batch size for calibration."""
    seed: int = seed_option()
    """Random seed."""
    method: Method = option("mhacut", panel="Rarer options")
    """Preset for all other research switches: mhacut's defaults (mhacut), or the method of arXiv 2405.20867
    (paper)."""
    allocation: Allocation = "curves"
    """Division of the budget among layers: by the measured sensitivity of each layer (curves), by the learned
    importance of each channel (indicator, with method=paper), or equally (uniform)."""
    basis: BasisChoice = "auto"
    """Channels to remove: original channels (channel), principal components of the channels (principal, in
    layers that allow an exact rotation), or the better of both for each layer (auto)."""
    positions: Positions = "auto"
    """Choice of v channels in attention heads that share convolution filters: different channels in each head
    (own), the same in all heads (equal), or the better of both for each layer (auto)."""
    repair: bool = True
    """Refit weights by least squares, so that the remaining channels reproduce the dense layer's output."""
    heal_steps: int | None = option(None, at_least=0)
    """Number of training steps per block (healing): each block learns to reproduce the dense block's output.
    Default: set by the effort."""
    tuning_steps: int | None = option(None, at_least=0)
    """Number of training steps of all weights together (tuning), to reproduce the dense model's logits or
    features without labels. Default: set by the effort."""
    tuning_lr: float | None = option(None, above=0, at_most=HIGHEST_RATE)
    """Learning rate of the joint training of all weights (tuning). Default: found by trial on held-out
    images."""
    token_weights: bool = True
    """Weight each token by its influence on the model's output when the errors of layers are measured. If
    off, all tokens have the same weight."""
    reweight: bool = True
    """Allow the training of 1 scale per remaining channel. Trained scales are merged into the weights."""
    gain_steps: int | None = option(None, at_least=0, needs={"reweight": True})
    """Number of training steps for the scales of the remaining channels. Default: 0, or 40 if the
    least-squares refit (repair) is off."""
    gain_lr: float = option(0.003, above=0, at_most=HIGHEST_RATE, needs=_SCALES)
    """Learning rate for the scales of the remaining channels."""
    selection: Selection = option("repair", needs=_INDICATORS)
    """Channels that a layer keeps at a given width: those with the smallest error after the least-squares
    refit (repair), or those with the highest learned importance (indicator)."""
    similarity: bool = option(True, needs=_INDICATORS)
    """Lower the learned importance of similar channels of a head (with method=paper)."""
    score_adjustment: bool = option(True, needs=_INDICATORS)
    """Keep the widths of all heads equal while the importance of channels is learned (with method=paper).
    If off, equal widths are enforced only in the final plan."""
    init: Init = option("attention-difference", needs=_INDICATORS)
    """Start values of the learned importance of each channel (with method=paper): by the effect of the
    channel on attention (attention-difference), or equal (uniform)."""
    steps: int = option(60, at_least=1, needs=_INDICATORS)
    """Number of training steps of the learned importance of each channel (with method=paper)."""
    lr: float = option(0.01, above=0, at_most=HIGHEST_RATE, needs=_INDICATORS)
    """Learning rate of the learned importance of each channel (with method=paper)."""
    budget_weight: float = option(1.0, at_least=0, needs=_INDICATORS)
    """Weight of the gradient that lowers the FLOPs to the budget, relative to the gradient of the loss
    (with method=paper)."""
    label_weight: float = option(0.1, at_least=0, needs=_SCALES)
    """Weight of the cross-entropy with labels, relative to the distillation loss, when channel scales and
    channel importance are trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selection == self.allocation == "indicator":
            expected = f"channel or auto with {option_name('selection', 'indicator')}"
            require("basis", self.basis, self.basis != "principal", expected)

    @property
    def trained_gain_steps(self) -> int:
        if not self.reweight:
            return 0
        if self.gain_steps is not None:
            return self.gain_steps
        return 0 if self.repair else UNREPAIRED_GAIN_STEPS

    @property
    def work(self) -> Work:
        return EFFORTS[self.effort]

    @property
    def healed_steps(self) -> int:
        return self.work.heal_steps if self.heal_steps is None else self.heal_steps

    @property
    def tuned_steps(self) -> int:
        return self.work.tuning_steps if self.tuning_steps is None else self.tuning_steps


@dataclass(frozen=True, kw_only=True)
class PruneOptions(
    CheckpointOptions,
    SearchOptions,
    DataOptions,
    TimingOptions,
    PreprocessingOptions,
    DeviceOptions,
    panel="Result",
):
    params: str | None = option(None, metavar="BUDGET")
    """Budget for the number of parameters: 2.8M, or 50% of the dense model's. Can be combined with other
    budgets."""
    size: str | None = option(None, metavar="BUDGET")
    """Budget for the size of the written file: 6MB, 5.5MiB, or 50% of the dense model's."""
    max_latency: str | None = option(None, metavar="TIME")
    """Budget for the time per batch: 12ms, or 50% of the dense model's time. The dense and the pruned model
    are timed."""
    max_kl: float | None = option(None, above=0, metavar="NATS")
    """Find the smallest model with at most this KL divergence (nats) from the dense model, on held-out
    calibration images."""
    max_drop: float | None = option(None, at_least=0, at_most=100, metavar="POINTS")
    """Find the smallest model that loses at most this many percentage points of the dense model's top-1
    accuracy. Needs labelled validation images."""
    as_: Literal["timm", "huggingface"] = "timm"
    """Treatment of a Hugging Face folder: convert the model to timm and write a slim file (timm), or keep the
    model's class and write a folder (huggingface)."""
    output: PathLike | None = option(None, metavar="FILE")
    """File or folder for the pruned model. Default: named after checkpoint and budget, in the working
    directory."""
    scope: Scope = "auto"
    """Parts to prune: attention channels, MLP channels, and tokens (token merging, in plain ViTs). auto: all
    that the model, the preserved outputs and the targets allow."""
    preserve: str | None = option(None, metavar="OUTPUTS")
    """Output to preserve: answers (logits), pooled (classifier inputs), tokens (patch features), pyramid
    (features_only maps), or layer names such as blocks.10,blocks.11. Default: answers, or tokens if there is
    no classifier."""
    keep_dead_tokens: bool = False
    """Compute all tokens in all blocks, so that patch features exist. Turns off token merging. If not set,
    the last block may compute only the tokens that the head reads."""
    round_to: int | None = option(None, at_least=1)
    """Round the number of channels per head and per MLP to a multiple of N. Default: 8, or 16 for a latency
    budget on a GPU."""
    overwrite: bool = False
    """Replace existing output files. The checkpoint is never replaced."""
    dry_run: bool = False
    """Show the result of pruning, but write no model."""
    report: PathLike | None = option(None, endings=(".html", ".htm"), metavar="FILE")
    """Write an HTML report of the run. Dry runs can have a report too."""
    calibration_images: int | None = option(None, at_least=1, panel="Data")
    """Number of calibration images. Default: 128, 256 or 1,024, set by the effort."""
    labels: bool = option(
        True, panel="Data", off="Ignore labels: search and validate with the dense model's outputs."
    )
    """Use the labels of the images, if labels exist. Without labels, no accuracy is measured."""
    eval_images: int = option(2000, at_least=0, panel="Measuring")
    """Number of validation images for comparing the pruned model with the dense model; 0 turns the comparison
    off."""
    amp: bool = option(False, panel="Computing")
    """Use bfloat16 autocast in training steps."""
    exclude: tuple[str, ...] = option((), panel="Rarer options", metavar="PATTERN", repeats=True)
    """Keep all channels of the layers or layer parts whose names match PATTERN: 'blocks.0.*', '*.attn.qk'.
    Can be repeated."""
    min_width: tuple[str, ...] = option((), panel="Rarer options", metavar="PATTERN=N", repeats=True)
    """Keep at least N channels per head or per MLP in layers whose names match PATTERN: 'blocks.*.mlp=256'.
    Can be repeated."""
    equal_qkv: bool = option(False, panel="Rarer options")
    """Give q, k and v of a layer the same number of channels, for fused attention in TensorRT and ONNX
    Runtime."""
    flops: str | tuple[str, ...] | None = option(None, metavar="BUDGET", repeats=True)
    """Budget for the FLOPs (multiply-accumulates) per image: 2.0G, 600M, or 50% of the dense model's. For
    several budgets, 1 file per budget is written."""

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Make the options from keyword arguments.

        The option ``method`` sets the defaults of other options.
        """
        # The super class raises the error for an unknown method.
        preset = METHODS.get(values.get("method", "mhacut"), {})
        return super().of(**{**preset, **values})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in BUDGETS:  # budgets are parsed here, and nowhere else
            value = getattr(self, name)
            if isinstance(value, tuple):
                several = tuple(Budget.parse(text, name) for text in dict.fromkeys(value))
                value = several if len(several) > 1 else next(iter(several), None)
            elif value is not None:
                value = Budget.parse(value, name)
            object.__setattr__(self, name, value)
        budgets = [name for name in BUDGETS if name in self.changed()]
        bounds = [name for name in BOUNDS if name in self.changed()]
        if not budgets and not bounds:
            others = ", ".join(map(option_name, (*BUDGETS[1:], *BOUNDS)))
            usage = f"{self.options()['flops'].help} Alternatives: {others}"
            raise UsageError(f"{option_name('flops')} is missing. {usage}")
        if budgets and bounds:
            bound, budget = (option_name(name, getattr(self, name)) for name in (bounds[0], budgets[0]))
            raise UsageError(
                f"{bound} and {budget} cannot be combined: leave out {budget} to find the smallest model "
                f"with {bound}"
            )
        if self.int8:
            require("int8", True, self.runtime == "onnx", option_name("runtime", "onnx"))
        self._check_kind()
        self._check_allocation()

    def _check_kind(self) -> None:
        timm = self.as_ == "timm"
        fits = self.output is None or os.fspath(self.output).lower().endswith(".safetensors") == timm
        require("output", self.output, fits, "a name that ends in .safetensors" if timm else "a folder")
        if timm:
            return
        asked = option_name("as_", self.as_)
        for name in self.changed():
            if name in OF_TIMM:
                raise UsageError(
                    f"{option_name(name, getattr(self, name))} does not work with {asked}, "
                    f"only with {option_name('as_', 'timm')}"
                )
        if self.several:
            raise UsageError(
                f"{option_name('flops', self.several)}: expected only 1 FLOPs budget with {asked}"
            )
        for name, values in (("preserve", (None, "answers", "tokens")), ("scope", ("auto", "attention+mlp"))):
            value = getattr(self, name)
            require(name, value, value in values, f"{values[-2]} or {values[-1]} with {asked}")

    def _check_allocation(self) -> None:
        # Indicators support a FLOPs budget only.
        if self.scope.endswith("+tokens"):
            expected = f"curves with {option_name('scope', self.scope)}"
            require("allocation", self.allocation, self.allocation == "curves", expected)
            if not self.bounds_work:
                raise UsageError(
                    f"{option_name('scope', self.scope)}: token merging does not change the parameters or "
                    f"the file size. Add {option_name('flops')}, {option_name('max_latency')}, "
                    f"{option_name('max_kl')} or {option_name('max_drop')}"
                )
        for name in set(OTHER_TARGETS).intersection(self.changed()):
            able = ("curves",) if name == "equal_qkv" else ("curves", "uniform")
            expected = f"{' or '.join(able)} with {option_name(name, getattr(self, name))}"
            require("allocation", self.allocation, self.allocation in able, expected)

    @property
    def budgets(self) -> dict[str, Budget]:
        """Budgets by option name. Several FLOPs budgets are left out: :attr:`several` holds them."""
        values = {name: getattr(self, name) for name in BUDGETS}
        return {name: value for name, value in values.items() if isinstance(value, Budget)}

    @property
    def several(self) -> tuple[str, ...]:
        return self.flops if isinstance(self.flops, tuple) else ()

    @property
    def bounds_work(self) -> bool:
        """Whether the targets limit FLOPs, time or loss, so that token merging can help."""
        return self.flops is not None or self.max_latency is not None or self.bounds_loss

    @property
    def bounds_loss(self) -> bool:
        return self.max_kl is not None or self.max_drop is not None

    @property
    def images_wanted(self) -> int:
        return self.calibration_images or self.work.calibration_images
