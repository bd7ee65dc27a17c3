"""Options of ``mhacut prune``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mhacut.errors import UsageError, option_name
from mhacut.options.base import (
    CheckpointOptions,
    DataOptions,
    DeviceOptions,
    PathLike,
    PreprocessingOptions,
    rate_option,
    seed_option,
)
from mhacut.options.option import Options, option, require
from mhacut.options.targets import TargetOptions
from mhacut.options.timing import TimingOptions

if TYPE_CHECKING:
    from typing_extensions import Self

Scope = Literal["attention", "attention+mlp", "attention+mlp+tokens"]
Init = Literal["attention-difference", "uniform"]
Temperature = Literal["kept", "dense"]
Selection = Literal["repair", "indicator"]
BasisChoice = Literal["auto", "channel", "principal"]
Positions = Literal["auto", "own", "equal"]
Allocation = Literal["curves", "indicator", "uniform"]
Method = Literal["mhacut", "paper"]
Effort = Literal["fast", "balanced", "best"]

UNREPAIRED_GAIN_STEPS = 40
"""Default number of steps that train channel scales without a repair. After a repair there are none: the
small gain on the calibration images hardly transfers to other images."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions(Options):
    """Search for the plan; every ingredient can be switched off for ablation."""

    method: Method = option(
        "mhacut",
        "Ingredients of the search: those of mhacut, or those of the paper (arXiv 2405.20867), which is "
        "--allocation indicator --selection indicator --no-repair --heal-steps 0; other options override it.",
        panel="Research switches",
    )
    effort: Effort = option(
        "balanced",
        "Amount of work: for a DeiT-S on two cores, fast takes 45 s, balanced 2 minutes, best 6.",
        panel="Result",
    )
    batch_size: int = option(16, "Images per batch.", panel="Computing", metavar="N", short="-b", at_least=1)
    seed: int = seed_option("Random seed.", panel="Computing")
    allocation: Allocation = option(
        "curves",
        "Division of the budget among layers: by sensitivity curves (curves), by trained indicators as in "
        "the paper (indicator), or uniformly (uniform).",
        panel="Research switches",
    )
    basis: BasisChoice = option(
        "auto",
        "Channels to choose from: the model's own (channel), principal components where that is exact "
        "(principal), or, per layer, those that leave the smaller error on held-out images (auto).",
        panel="Research switches",
    )
    positions: Positions = option(
        "auto",
        "Kept v channels of heads that share convolution filters: each head its own, with its own copy of "
        "the filters (own), the same positions in all heads (equal), or, per layer, the choice that leaves "
        "the smaller error on held-out images (auto).",
        panel="Research switches",
    )
    repair: bool = option(
        True,
        "Refit by least squares the weights that read the output of a pruned layer.",
        panel="Research switches",
    )
    heal_steps: int | None = option(
        None,
        "Training steps per block of the pruned model, in order, to reproduce the output of the dense "
        "model's block; by default the effort decides.",
        panel="Research switches",
        metavar="N",
        at_least=0,
    )
    token_weights: bool = option(
        True,
        "Weight each token by its influence on the model's output; off: all tokens count alike.",
        panel="Research switches",
    )
    temperature: Temperature = option(
        "kept",
        "Softmax scale if repair finds no better one: 1/sqrt(kept width) (kept) or the dense one (dense).",
        panel="Research switches",
    )
    reweight: bool = option(
        True, "Train a scale per kept channel, merged into the weights.", panel="Research switches"
    )
    gain_steps: int | None = option(
        None,
        f"Optimiser steps of the channel scales; by default {UNREPAIRED_GAIN_STEPS}, or none with repair.",
        panel="Research switches",
        metavar="N",
        at_least=0,
    )
    gain_lr: float = rate_option(0.003, "Learning rate of the channel scales.", panel="Research switches")
    selection: Selection = option(
        "repair",
        "Channels to keep once the widths are found: those that leave the smallest error after the repair "
        "(repair), or those with the best indicators (indicator).",
        panel="Research switches",
    )
    similarity: bool = option(
        True,
        "Weight indicators by how little a channel resembles the other channels of its head.",
        panel="Research switches",
    )
    score_adjustment: bool = option(
        True,
        "Keep the widths of all heads equal while indicators are trained; off: only in the final plan.",
        panel="Research switches",
    )
    init: Init = option(
        "attention-difference", "Initial values of the indicators.", panel="Research switches"
    )
    steps: int = option(
        60, "Optimiser steps of the indicators.", panel="Research switches", metavar="N", at_least=1
    )
    lr: float = rate_option(0.01, "Learning rate of the indicators.", panel="Research switches")
    budget_weight: float = option(
        1.0,
        "Weight of the budget's gradient relative to the task's.",
        panel="Research switches",
        metavar="WEIGHT",
        at_least=0,
    )
    label_weight: float = option(
        0.1,
        "Weight of the cross-entropy with labels relative to the distillation loss.",
        panel="Research switches",
        metavar="WEIGHT",
        at_least=0,
    )

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
    def healed_steps(self) -> int:
        """Steps that train each block by itself."""
        return EFFORTS[self.effort].heal_steps if self.heal_steps is None else self.heal_steps

    def idle(self) -> dict[str, str]:
        """Names of options that were changed to no effect, each with the reason."""
        found: dict[str, str] = {}
        allocation = option_name("allocation", self.allocation)
        if not self.by_indicators:
            found |= dict.fromkeys(_OF_INDICATORS, f"{allocation} trains no indicators")
            if self.trained_gain_steps == 0:
                found["label_weight"] = "neither indicators nor channel scales are trained"
        if not self.reweight:
            reason = f"{option_name('reweight', False)} trains no channel scales"
            found |= dict.fromkeys(("gain_steps", "gain_lr"), reason)
        elif self.trained_gain_steps == 0 and not self.by_indicators:
            found["gain_lr"] = f"no channel scales are trained; see {option_name('gain_steps')}"
        if self.gain_steps is None and self.repair and not self.by_indicators:
            asked = option_name("gain_steps")
            found["reweight"] = f"after a repair no channel scales are trained unless {asked} asks for it"
        if self.by_indicators and not self.repair:
            found["basis"] = f"{allocation} chooses among the model's own channels"
        return {name: found[name] for name in found if name in self.changed()}


METHODS: Mapping[Method, Mapping[str, object]] = {
    "mhacut": {},
    "paper": {"allocation": "indicator", "selection": "indicator", "repair": False, "heal_steps": 0},
}
"""Values of the options that a method decides, unless they are given."""
_OF_INDICATORS = (
    "similarity",
    "score_adjustment",
    "init",
    "steps",
    "lr",
    "budget_weight",
    "selection",
)


@dataclass(frozen=True)
class Work:
    """Amount of work that an effort stands for."""

    calibration_images: int
    heal_steps: int


EFFORTS: Mapping[str, Work] = {
    "fast": Work(calibration_images=128, heal_steps=0),
    "balanced": Work(calibration_images=256, heal_steps=40),
    "best": Work(calibration_images=1024, heal_steps=150),
}


@dataclass(frozen=True, kw_only=True)
class PruneOptions(TargetOptions, CheckpointOptions, DeviceOptions):
    """Options of ``mhacut prune``."""

    output: PathLike | None = option(
        None,
        "File to write; by default named after the checkpoint and the budget, in the working directory.",
        panel="Result",
        metavar="FILE",
        short="-o",
        endings=(".safetensors",),
    )
    search: SearchOptions = field(default_factory=SearchOptions)
    scope: Scope = option(
        "attention+mlp",
        "Parts that may be pruned: channels of attention; also channels of MLPs; also tokens, which the "
        "blocks of a plain ViT then merge.",
        panel="Result",
    )
    preserve: str | None = option(
        None,
        "Outputs to preserve: answers (the classifier's outputs), pooled (its inputs), tokens (the features "
        "of all tokens), pyramid (the feature maps of timm's features_only), or names of layers "
        "(blocks.10,blocks.11). By default answers, or tokens if there is no classifier.",
        panel="Result",
        metavar="answers|pooled|tokens|pyramid|LAYERS",
    )
    keep_dead_tokens: bool = option(
        False,
        "Compute all tokens in the last block, not only the one the classifier reads; for patch features.",
        panel="Result",
    )
    round_to: int | None = option(
        None,
        "Round widths to multiples of N; by default 8, or 16 with a budget of time on a GPU.",
        panel="Result",
        metavar="N",
        at_least=1,
    )
    overwrite: bool = option(
        False, "Replace an existing file; the checkpoint is never replaced.", panel="Result"
    )
    dry_run: bool = option(False, "Find the plan and show its results; write no model.", panel="Result")
    report: PathLike | None = option(
        None,
        "Write an HTML report of the run; dry runs can have one too.",
        panel="Result",
        metavar="FILE",
        endings=(".html", ".htm"),
    )
    data: DataOptions = field(default_factory=DataOptions)
    calibration_images: int | None = option(
        None,
        "Number of images to calibrate on; by default the effort decides.",
        panel="Data",
        metavar="N",
        at_least=1,
    )
    calibration: PathLike | None = option(
        None,
        "File that keeps the calibration: written if it is not there, otherwise read; one made under "
        "other conditions is refused.",
        panel="Data",
        metavar="FILE",
        endings=(".safetensors",),
    )
    labels: bool = option(
        True,
        "Use labels if there are any; off: search by the dense model's outputs alone and measure no "
        "accuracy.",
        panel="Data",
    )
    eval_images: int = option(
        2000,
        "Validation images to measure accuracy on; 0 for none.",
        panel="Measuring",
        metavar="N",
        at_least=0,
    )
    timing: TimingOptions = field(default_factory=TimingOptions)
    amp: bool = option(False, "Use bfloat16 autocast in the steps that train.", panel="Computing")
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_others(self.scope, self.search.allocation)
        kept = self.calibration
        if kept is not None and self.output is not None and Path(kept) == Path(self.output):
            raise UsageError(f"{option_name('calibration', kept)}: expected another file than the output")

    @classmethod
    def from_flat(cls, **values: Any) -> Self:
        """Make the options from values by flat names; the method decides some that are not given."""
        preset = METHODS.get(values.get("method", "mhacut"), {})
        return super().from_flat(**{**preset, **values})

    @property
    def images_wanted(self) -> int:
        """``calibration_images``, or the number that the effort stands for."""
        if self.calibration_images is not None:
            return self.calibration_images
        return EFFORTS[self.search.effort].calibration_images

    def idle(self, *, in_memory: bool = False) -> dict[str, str]:
        """Names of options that were changed to no effect, each with the reason.

        Args:
            in_memory: whether images are given that no option names.
        """
        search = self.search
        found = search.idle() | self.timing.idle(bounded=self.max_latency is not None)
        trained = search.trained_gain_steps or search.healed_steps
        if self.amp and not (search.by_indicators or trained):
            found["amp"] = "nothing is trained"
        if in_memory:
            found |= dict.fromkeys(self.data.changed(), "images are in memory")
        elif not self.data.has_images:
            reason = f"there are no images without {option_name('data_dir')} or {option_name('dataset')}"
            found |= dict.fromkeys(self.data.changed(), reason)
            found |= dict.fromkeys({"labels", "eval_images"}.intersection(self.changed()), reason)
        has_images = in_memory or self.data.has_images
        if has_images and not self.labels and self.eval_images != 0 and "eval_images" in self.changed():
            found["eval_images"] = f"{option_name('labels', False)} measures no accuracy"
        return found
