"""Options of ``mhacut prune``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from mhacut.options.base import (
    CheckpointOptions,
    DataOptions,
    PathLike,
    PreprocessingOptions,
    changed,
    require,
    require_choice,
    require_page,
)

Scope = Literal["attention", "attention+mlp"]


Init = Literal["attention-difference", "uniform"]


Temperature = Literal["kept", "dense"]


Selection = Literal["repair", "indicator"]


BasisChoice = Literal["auto", "channel", "principal"]


Positions = Literal["auto", "own", "equal"]


Allocation = Literal["curves", "indicator", "refined", "uniform"]


Effort = Literal["fast", "balanced", "best"]


@dataclass(frozen=True)
class SearchOptions:
    """How to search; every ingredient can be switched off for ablation."""

    effort: Effort = "balanced"
    """How much work to put in where nothing else is said: see :data:`EFFORTS`."""
    allocation: Allocation = "curves"
    """How the budget is spread over layers and kinds: by error curves, by trained indicators (the paper's
    way), by indicators that start from the curves' plan, where they do better on held-out images, or the
    same share everywhere."""
    basis: BasisChoice = "auto"
    """What a channel is: one of the model's own, a principal one where the algebra allows it, or, per unit,
    that which leaves the smaller error on held-out images."""
    positions: Positions = "auto"
    """Which v channels heads keep that share the filters of a convolution (focused linear attention): each
    its own, with a copy of the filters, the same positions in all, or, per unit, that which leaves the
    smaller error on held-out images. (In multi-query attention there is no room for copies: equal.)"""
    similarity: bool = True
    """Weight indicators by how unlike the other channels of its head a channel is."""
    score_adjustment: bool = True
    """Hold the widths of all heads equal while training; off, only the final plan does."""
    init: Init = "attention-difference"
    """Where indicators start."""
    reweight: bool = True
    """Train a channel scale per kept channel, merged into the weights."""
    temperature: Temperature = "kept"
    """Softmax scale of a cut layer while searching, and where repair does not fit a better one:
    1/sqrt(kept width), or the dense model's."""
    steps: int = 60
    """Optimiser steps of the indicators, where they are trained."""
    gain_steps: int | None = None
    """Optimiser steps of the scales on the final plan; None is :data:`UNREPAIRED_GAIN_STEPS` without repair,
    and none with it."""
    tuning_steps: int | None = None
    """Optimiser steps that tune all weights of the slim model on the calibration images, with the dense model
    as teacher; None is what the effort says."""
    batch_size: int = 16
    """Images at a time."""
    lr: float = 0.01
    """Adam's, for indicators."""
    gain_lr: float = 0.003
    """Adam's, for channel scales."""
    tuning_lr: float = 3e-5
    """Adam's, for tuning."""
    budget_weight: float = 1.0
    """Weight of the budget's gradient against the task's, both at unit scale."""
    label_weight: float = 0.1
    """Weight of the cross-entropy beside the distillation loss, where there are labels."""
    repair: bool = True
    """Refit, in closed form, what reads a cut layer."""
    swap_moves: bool | None = None
    """Swap kept v and hidden channels for others once widths are known, as long as that leaves less error
    after the repair; None is what the effort says."""
    repair_in_order: bool | None = None
    """Refit once more, in order, each layer on what the layers cut before it give; None is what the effort
    says."""
    token_weights: bool = True
    """Count each token as much as it influences the answer, in what is fitted and judged; off, all alike."""
    selection: Selection = "repair"
    """Which channels fill the widths found: those that serve best once repaired, or the best indicators,
    where they are trained."""
    seed: int = 42
    """Of everything random."""

    def __post_init__(self) -> None:
        require_choice("--effort", self.effort, get_args(Effort))
        require_choice("--allocation", self.allocation, get_args(Allocation))
        require_choice("--basis", self.basis, get_args(BasisChoice))
        require_choice("--positions", self.positions, get_args(Positions))
        require_choice("--init", self.init, get_args(Init))
        require_choice("--temperature", self.temperature, get_args(Temperature))
        require_choice("--selection", self.selection, get_args(Selection))
        require("--steps", self.steps, self.steps >= 1, "at least 1")
        gain_steps = 0 if self.gain_steps is None else self.gain_steps
        require("--gain-steps", gain_steps, gain_steps >= 0, "at least 0")
        require("--batch-size", self.batch_size, self.batch_size >= 1, "at least 1")
        require("--tuning-steps", self.tuned_steps, self.tuned_steps >= 0, "at least 0")
        for flag, value in (
            ("--lr", self.lr),
            ("--gain-lr", self.gain_lr),
            ("--tuning-lr", self.tuning_lr),
        ):
            require(flag, value, 0 < value < float("inf"), "above 0")
        for flag, value in (("--budget-weight", self.budget_weight), ("--label-weight", self.label_weight)):
            require(flag, value, 0 <= value < float("inf"), "at least 0")
        if self.selection == "indicator" and self.by_indicators:
            own = self.basis != "principal"
            require("--basis", self.basis, own, "channel with --selection indicator, whose choice it keeps")

    @property
    def by_indicators(self) -> bool:
        """Whether indicators are trained."""
        return self.allocation in ("indicator", "refined")

    @property
    def trained_gain_steps(self) -> int:
        """Steps that train only channel scales."""
        if not self.reweight:
            return 0
        if self.gain_steps is not None:
            return self.gain_steps
        return 0 if self.repair else UNREPAIRED_GAIN_STEPS

    @property
    def swaps(self) -> bool:
        """Whether kept channels are swapped for others."""
        asked = EFFORTS[self.effort].swap_moves if self.swap_moves is None else self.swap_moves
        return self.repair and asked

    @property
    def repairs_in_order(self) -> bool:
        """Whether readouts are refitted on what the cut model gives them."""
        asked = EFFORTS[self.effort].repair_in_order if self.repair_in_order is None else self.repair_in_order
        return self.repair and asked

    @property
    def tuned_steps(self) -> int:
        """Steps that tune all weights."""
        return EFFORTS[self.effort].tuning_steps if self.tuning_steps is None else self.tuning_steps

    def idle(self) -> dict[str, str]:
        """Fields that were changed to no effect, each with the reason."""
        found: dict[str, str] = {}
        if not self.by_indicators:
            reason = f"--allocation {self.allocation} trains no indicators"
            found |= dict.fromkeys(_OF_INDICATORS, reason)
        elif self.allocation == "refined":
            reason = "--allocation refined starts from the plan of the curves"
            found |= dict.fromkeys(("similarity", "init"), reason)
            found["selection"] = "--allocation refined keeps what serves best once repaired"
        if not self.reweight:
            found |= dict.fromkeys(("gain_steps", "gain_lr"), "--no-reweight trains no gains")
        elif self.trained_gain_steps == 0 and not self.by_indicators:
            found["gain_lr"] = "no gains are trained; see --gain-steps"
        if self.gain_steps is None and self.repair and not self.by_indicators:
            found["reweight"] = "after a repair no gains are trained unless --gain-steps asks for it"
        if not self.repair:
            found |= dict.fromkeys(("repair_in_order", "swap_moves"), "--no-repair refits nothing")
        elif self.allocation == "indicator" and self.selection == "indicator":
            found["swap_moves"] = "--selection indicator keeps the indicators' choice"
        if self.tuned_steps == 0:
            found["tuning_lr"] = "nothing is tuned; see --tuning-steps"
        return {name: found[name] for name in found if name in changed(self)}


_OF_INDICATORS = (
    "similarity",
    "score_adjustment",
    "init",
    "steps",
    "lr",
    "budget_weight",
    "label_weight",
    "selection",
)


@dataclass(frozen=True)
class Work:
    """What an effort amounts to."""

    calibration_images: int
    sensitivity_share: float
    """Of the calibration images that are differentiated, of those to fit."""
    swap_moves: bool
    repair_in_order: bool
    tuning_steps: int


EFFORTS: Mapping[str, Work] = {
    "fast": Work(
        calibration_images=128, sensitivity_share=0.5, swap_moves=False, repair_in_order=False, tuning_steps=0
    ),
    "balanced": Work(
        calibration_images=256, sensitivity_share=1.0, swap_moves=False, repair_in_order=True, tuning_steps=0
    ),
    "best": Work(
        calibration_images=1024,
        sensitivity_share=0.5,
        swap_moves=True,
        repair_in_order=True,
        tuning_steps=400,
    ),
}


UNREPAIRED_GAIN_STEPS = 40
"""Gains are worth training where nothing else makes up for a cut; after a repair few of them hold on images
that they were not trained on."""


@dataclass(frozen=True, kw_only=True)
class PruneOptions(CheckpointOptions):
    """Everything ``mhacut prune`` can be told."""

    flops: str
    """``2.0G``, ``600M``, ``2e9`` or ``50%``; one FLOP is one multiply-accumulate."""
    output: PathLike | None = None
    """The file to write; None is ``<stem>-<budget>.safetensors`` in the working directory."""
    overwrite: bool = False
    """Replace an existing file; the input is never replaced."""
    dry_run: bool = False
    """Find the plan, write no slim file."""
    report: PathLike | None = None
    """A page to write about the run, a dry one too."""
    scope: Scope = "attention+mlp"
    """What may be cut."""
    round_to: int = 8
    """Widths are multiples of it."""
    calibration_images: int | None = None
    """How many images to search on; None is what the effort says."""
    labels: bool = True
    """Use labels where there are any; off, distillation only."""
    eval_images: int = 2000
    """How many validation images to measure accuracy on; 0 for none."""
    latency: bool = True
    """Measure latency before and after."""
    latency_batch_size: int = 8
    """Images at a time when it is measured."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:N``."""
    amp: bool = False
    """bfloat16 autocast where indicators, channel scales or weights are trained."""
    data: DataOptions = field(default_factory=DataOptions)
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)
    search: SearchOptions = field(default_factory=SearchOptions)

    def __post_init__(self) -> None:
        if self.output is not None:
            name = os.fspath(self.output)
            require("--output", name, name.endswith(".safetensors"), "a name that ends in .safetensors")
        if self.report is not None:
            require_page("--report", self.report)
        require_choice("--scope", self.scope, get_args(Scope))
        require("--round-to", self.round_to, self.round_to >= 1, "at least 1")
        require("--calibration-images", self.images_wanted, self.images_wanted >= 1, "at least 1")
        require("--latency-batch-size", self.latency_batch_size, self.latency_batch_size >= 1, "at least 1")
        require("--eval-images", self.eval_images, self.eval_images >= 0, "at least 0")

    @property
    def images_wanted(self) -> int:
        """``calibration_images``, or what the effort says."""
        if self.calibration_images is not None:
            return self.calibration_images
        return EFFORTS[self.search.effort].calibration_images

    def idle(self) -> dict[str, str]:
        """Options that were changed to no effect, each with the reason."""
        search = self.search
        found = search.idle()
        if self.amp and not (search.by_indicators or search.trained_gain_steps or search.tuned_steps):
            found["amp"] = "nothing is trained"
        if self.data.data_dir is None and self.data.dataset is None:
            there = "there are no images without --data-dir or --dataset"
            found |= dict.fromkeys(changed(self.data), there)
            found |= dict.fromkeys({"labels", "eval_images"}.intersection(changed(self)), there)
        return found
