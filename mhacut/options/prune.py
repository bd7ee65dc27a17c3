"""Options of ``mhacut prune``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mhacut.errors import UsageError, option_name
from mhacut.options.base import (
    HIGHEST_RATE,
    CheckpointOptions,
    DataOptions,
    DeviceOptions,
    ModelOptions,
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
"""Default number of steps that train channel scales without a repair. After a repair there are none: the
small gain on the calibration images hardly transfers to other images."""
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
"""Values of the options that a method decides, unless they are given."""
_INDICATORS = {"allocation": "indicator"}
_SCALES = {"gain_steps": GIVEN, "allocation": "indicator", "repair": False}
"""Options with which channel scales are trained."""


@dataclass(frozen=True)
class Work:
    """Amount of work that an effort stands for."""

    calibration_images: int
    heal_steps: int
    tuning_steps: int
    replayed_images: int = 16
    """Images on which layers are run again for their curves."""


# docs/guides/prune.md has the accuracy, time and memory of each, docs/explanation/choices.md the reasons.
EFFORTS: Mapping[str, Work] = {
    "fast": Work(128, 0, 0, replayed_images=8),
    "balanced": Work(256, 40, 150),
    "best": Work(1024, 40, 1250),
}
BUDGETS, BOUNDS = ("flops", "params", "size", "max_latency"), ("max_kl", "max_drop")
OTHER_TARGETS = (*BUDGETS[1:], *BOUNDS, "exclude", "min_width", "equal_qkv")
"""Options that state a budget, that bound a loss, and all targets and constraints but FLOPs."""
_OTHERS = ("amp", "calibration", "calibration_images", "int8", "keep_dead_tokens", "report", "round_to")
OF_TIMM = {*OTHER_TARGETS, *PreprocessingOptions.options(), *ModelOptions.options(), "runtime", *_OTHERS}
"""Options that are for models of timm alone."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions(Options, panel="Research switches"):
    """Search for the plan; every ingredient can be switched off for ablation."""

    effort: Effort = option("balanced", panel="Result")
    """Amount of work: for a DeiT-S on two cores, fast takes a minute; balanced 90 s, or 8 minutes where much
    is lost; best still longer if there are thousands of images."""
    batch_size: int = option(16, panel="Computing", at_least=1)
    """Images per batch."""
    seed: int = seed_option()
    """Random seed."""
    method: Method = "mhacut"
    """Ingredients of the search: those of mhacut, or those of the paper (arXiv 2405.20867), with allocation
    and selection by indicators, no repair and no healing; other options override it."""
    allocation: Allocation = "curves"
    """Division of the budget among layers: by sensitivity curves (curves), by trained indicators as in the
    paper (indicator), or uniformly (uniform)."""
    basis: BasisChoice = "auto"
    """Channels to choose from: the model's own (channel), principal components where that is exact
    (principal), or, per layer, those that leave the smaller error on held-out images (auto)."""
    positions: Positions = "auto"
    """Kept v channels of heads that share convolution filters: each head its own, with its own copy of the
    filters (own), the same positions in all heads (equal), or, per layer, the choice that leaves the smaller
    error on held-out images (auto)."""
    repair: bool = True
    """Refit by least squares the weights that read the output of a pruned layer."""
    heal_steps: int | None = option(None, at_least=0)
    """Training steps per block of the pruned model, in order, to reproduce the output of the dense model's
    block; by default the effort decides."""
    tuning_steps: int | None = option(None, at_least=0)
    """Training steps of all weights at once, to give the dense model's answers for all images of the split,
    without labels; by default the effort decides. Features are tuned only if tokens merge, on the images to
    calibrate on."""
    tuning_lr: float | None = option(None, above=0, at_most=HIGHEST_RATE)
    """Learning rate; by default found on crops of held-out images, for features by a trial step."""
    token_weights: bool = True
    """Weight each token by its influence on the model's output; off: all tokens count alike."""
    reweight: bool = True
    """Train a scale per kept channel, merged into the weights."""
    gain_steps: int | None = option(None, at_least=0, needs={"reweight": True})
    """Optimiser steps of the channel scales; by default 40, or none with repair."""
    gain_lr: float = option(0.003, above=0, at_most=HIGHEST_RATE, needs=_SCALES)
    """Learning rate of the channel scales."""
    selection: Selection = option("repair", needs=_INDICATORS)
    """Channels to keep once the widths are found: those that leave the smallest error after the repair
    (repair), or those with the best indicators (indicator)."""
    similarity: bool = option(True, needs=_INDICATORS)
    """Weight indicators by how little a channel resembles the other channels of its head."""
    score_adjustment: bool = option(True, needs=_INDICATORS)
    """Keep the widths of all heads equal while indicators are trained; off: only in the final plan."""
    init: Init = option("attention-difference", needs=_INDICATORS)
    """Initial values of the indicators."""
    steps: int = option(60, at_least=1, needs=_INDICATORS)
    """Optimiser steps of the indicators."""
    lr: float = option(0.01, above=0, at_most=HIGHEST_RATE, needs=_INDICATORS)
    """Learning rate of the indicators."""
    budget_weight: float = option(1.0, at_least=0, needs=_INDICATORS)
    """Weight of the budget's gradient relative to the task's."""
    label_weight: float = option(0.1, at_least=0, needs=_SCALES)
    """Weight of the cross-entropy with labels relative to the distillation loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selection == "indicator" and self.by_indicators:
            expected = f"channel with {option_name('selection', 'indicator')}, whose choice it keeps"
            require("basis", self.basis, self.basis != "principal", expected)

    @property
    def by_indicators(self) -> bool:
        """Whether indicators are trained."""
        return self.allocation == "indicator"

    @property
    def trained_gain_steps(self) -> int:
        """Steps that train only channel scales."""
        if not self.reweight:
            return 0
        if self.gain_steps is not None:
            return self.gain_steps
        return 0 if self.repair else UNREPAIRED_GAIN_STEPS

    @property
    def work(self) -> Work:
        """Amount of work that the effort stands for."""
        return EFFORTS[self.effort]

    @property
    def healed_steps(self) -> int:
        """Steps that train each block by itself."""
        return self.work.heal_steps if self.heal_steps is None else self.heal_steps

    @property
    def tuned_steps(self) -> int:
        """Steps that train all weights at once."""
        return self.work.tuning_steps if self.tuning_steps is None else self.tuning_steps


@dataclass(frozen=True, kw_only=True)
class PruneKeywords(
    ModelOptions,
    SearchOptions,
    DataOptions,
    TimingOptions,
    PreprocessingOptions,
    DeviceOptions,
    panel="Result",
):
    """Keywords of :func:`mhacut.prune` and :func:`mhacut.prune_many`."""

    params: str | None = option(None, metavar="BUDGET")
    """Budget of parameters: 2.8M or 50%. Several kinds of budget can be combined; all are met."""
    size: str | None = option(None, metavar="BUDGET")
    """Budget for the size of the written file: 6MB, 5.5MiB or 50%, in the checkpoint's dtype."""
    max_latency: str | None = option(None, metavar="TIME")
    """Budget for the time per batch: 12ms, or 50% of the dense model's time. The pruned model is timed beside
    the dense one, on the device and under the conditions that the options of latency state."""
    max_kl: float | None = option(None, above=0, metavar="NATS")
    """Find the smallest model whose outputs have at most this KL divergence, in nats, from those of the dense
    model on the held-out calibration images."""
    max_drop: float | None = option(None, at_least=0, at_most=100, metavar="POINTS")
    """Find the smallest model that loses at most this many points of top-1 accuracy on the labelled
    validation images."""
    as_: Literal["timm", "huggingface"] = "timm"
    """Kind of model to prune a folder of transformers as, and to write: a slim file of timm's model, or a
    folder of the same class (huggingface), which mhacut.load_pruned opens."""
    output: PathLike | None = option(None, metavar="FILE")
    """File, or folder, to write; by default named after checkpoint and budget, in the working directory."""
    scope: Scope = "auto"
    """Parts that may be pruned: channels of attention; also channels of MLPs; also tokens, which the
    blocks of a plain ViT then merge. auto takes all that the model, its outputs and the targets allow."""
    preserve: str | None = option(None, metavar="OUTPUTS")
    """Outputs to preserve: answers (the classifier's outputs), pooled (its inputs), tokens (the features of
    all tokens), pyramid (the feature maps of timm's features_only), or names of layers (blocks.10,blocks.11).
    By default answers, or tokens if there is no classifier; no others as huggingface."""
    keep_dead_tokens: bool = False
    """Compute all tokens in the last block, not only the one the classifier reads, and merge none with
    scope auto; for patch features."""
    round_to: int | None = option(None, at_least=1)
    """Round widths to multiples of N; by default 8, or 16 with a budget of time on a GPU."""
    overwrite: bool = False
    """Replace an existing file; the checkpoint is never replaced."""
    dry_run: bool = False
    """Find the plan and show its results; write no model."""
    report: PathLike | None = option(None, endings=(".html", ".htm"), metavar="FILE")
    """Write an HTML report of the run; dry runs can have one too."""
    calibration_images: int | None = option(None, at_least=1, panel="Data")
    """Number of images to calibrate on; by default the effort decides."""
    calibration: PathLike | None = option(None, endings=(".pt", ".pth"), panel="Data", metavar="FILE")
    """File (.pt) that keeps the calibration: written if it is not there, otherwise read; one made under other
    conditions is refused."""
    labels: bool = option(True, panel="Data")
    """Use labels if there are any; off: search by the dense model's outputs alone and measure no accuracy."""
    eval_images: int = option(2000, at_least=0, panel="Measuring")
    """Validation images to judge the result on, with or without labels; 0 for none."""
    amp: bool = option(False, panel="Computing")
    """Use bfloat16 autocast in the steps that train."""
    exclude: tuple[str, ...] = option((), panel="Rarer options", metavar="PATTERN", repeats=True)
    """Do not prune layers or units whose names match: 'blocks.0.*', '*.attn.qk'. Can be repeated."""
    min_width: tuple[str, ...] = option((), panel="Rarer options", metavar="PATTERN=N", repeats=True)
    """Keep at least N channels per head, or in an MLP, where names match: 'blocks.*.mlp=256'. Can be
    repeated."""
    equal_qkv: bool = option(False, panel="Rarer options")
    """Keep the q/k and v widths of each layer equal, for fused attention in TensorRT and ONNX Runtime."""


@dataclass(frozen=True, kw_only=True)
class PruneOptions(PruneKeywords, CheckpointOptions, panel="Result"):
    """Options of ``mhacut prune``."""

    flops: str | tuple[str, ...] | None = option(None, metavar="BUDGET", repeats=True)
    """Budget: 2.0G, 600M, 2e9 or 50%. One FLOP is one multiply-accumulate, attention included. If several are
    given, one file is written for each."""

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Make the options from values by name; the method decides some that are not given."""
        # An unknown method is refused below, with the names of those that exist.
        preset = METHODS.get(values.get("method", "mhacut"), {})
        return super().of(**{**preset, **values})

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.flops, tuple):  # one budget is one, however it was given
            several = self.flops
            object.__setattr__(self, "flops", several if len(several) > 1 else next(iter(several), None))
            for text in several:
                require("flops", text, several.count(text) == 1, "each budget once")
        budgets = [name for name in BUDGETS if name in self.changed()]
        bounds = [name for name in BOUNDS if name in self.changed()]
        if not budgets and not bounds:
            others = ", ".join(map(option_name, (*BUDGETS[1:], *BOUNDS[:-1])))
            raise UsageError(
                f"{option_name('flops')} is missing. {self.options()['flops'].help} In its place you can "
                f"give {others} or {option_name(BOUNDS[-1])}"
            )
        if budgets and bounds:
            bound, budget = (option_name(name, getattr(self, name)) for name in (bounds[0], budgets[0]))
            raise UsageError(
                f"{bound} searches for the smallest model, but {budget} fixes its size; leave one out"
            )
        if self.int8:
            require("int8", True, self.runtime == "onnx", option_name("runtime", "onnx"))
        self._check_kind()
        self._check_allocation()

    def _check_kind(self) -> None:
        """Raise a :class:`UsageError` for options that do not go with the kind of model."""
        timm = self.as_ == "timm"
        fits = self.output is None or os.fspath(self.output).lower().endswith(".safetensors") == timm
        require("output", self.output, fits, "a name that ends in .safetensors" if timm else "a folder")
        if timm:
            return
        asked = option_name("as_", self.as_)
        for name in self.changed():
            if name in OF_TIMM:
                raise UsageError(f"{option_name(name, getattr(self, name))} does not go with {asked}")
        if self.several:
            raise UsageError(f"{option_name('flops', self.several)}: expected one budget with {asked}")
        for name, values in (("preserve", (None, "answers", "tokens")), ("scope", ("auto", "attention+mlp"))):
            value = getattr(self, name)
            require(name, value, value in values, f"{values[-2]} or {values[-1]} with {asked}")

    def _check_allocation(self) -> None:
        """Raise a :class:`UsageError` unless the budget is divided in a way that knows the targets."""
        # Indicators are trained towards a budget of FLOPs alone.
        if self.scope.endswith("+tokens"):
            expected = f"curves with {option_name('scope', self.scope)}, which compares merges by the curves"
            require("allocation", self.allocation, self.allocation == "curves", expected)
            if not self.bounds_work:
                raise UsageError(
                    f"{option_name('scope', self.scope)}: expected {option_name('flops')}, "
                    f"{option_name('max_latency')}, {option_name('max_kl')} or {option_name('max_drop')}; "
                    "merging tokens changes neither the number of parameters nor the size of the file"
                )
        for name in set(OTHER_TARGETS).intersection(self.changed()):
            able = ("curves",) if name == "equal_qkv" else ("curves", "uniform")
            expected = f"{' or '.join(able)} with {option_name(name, getattr(self, name))}"
            require("allocation", self.allocation, self.allocation in able, expected)

    @property
    def flops_of_each(self) -> tuple[str | None, ...]:
        """Budget of FLOPs of each file to write; None where there is none."""
        return self.flops if isinstance(self.flops, tuple) else (self.flops,)

    @property
    def several(self) -> tuple[str, ...]:
        """Several budgets of FLOPs, each for a file of its own; empty for one or none."""
        return self.flops if isinstance(self.flops, tuple) else ()

    @property
    def bounds_work(self) -> bool:
        """Whether merged tokens help to meet the targets; they leave parameters and bytes as they are."""
        return self.flops is not None or self.max_latency is not None or self.bounds_loss

    @property
    def bounds_loss(self) -> bool:
        """Whether the smallest model within a bound on the loss is to be found."""
        return self.max_kl is not None or self.max_drop is not None

    @property
    def images_wanted(self) -> int:
        """``calibration_images``, or the number that the effort stands for."""
        return self.calibration_images or self.work.calibration_images
