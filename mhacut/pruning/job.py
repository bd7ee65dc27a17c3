"""The pruning job: a model, its prunable layers, and everything that decides how they are cut."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mhacut.adapters.base import Unit
from mhacut.data.reading import Sample
from mhacut.options.prune import SearchOptions
from mhacut.plan import UnitKey, Unmerge
from mhacut.pruning.calibrate import Calibration, calibrate, held_out_count
from mhacut.pruning.distill import Distillation
from mhacut.pruning.fisher import FISHER_IMAGES
from mhacut.pruning.limits import MULTIPLE, NO_CONSTRAINTS, Constraints, Limits, width_choices
from mhacut.pruning.preserve import Preserved
from mhacut.runtime.distributed import Processes
from mhacut.runtime.progress import SILENT, Reporter
from mhacut.surgery.costs import CostTable
from mhacut.surgery.find import PrunableLayers


@dataclass(frozen=True)
class Job:
    """One model and the settings of its pruning. Constant during the search."""

    model: nn.Module
    """Dense model in eval mode, float32, without gradients. Never modified."""
    prunable: PrunableLayers
    units: tuple[Unit, ...]
    """Groups of channels that may be cut: q/k or v of an attention layer, or an MLP's hidden channels."""
    table: CostTable
    """FLOPs of the model as a function of its widths."""
    images: Tensor
    """Normalised calibration images, [n, C, H, W]."""
    options: SearchOptions
    labels: Tensor | None = None
    """Class index of each calibration image, [n]. None without labels, or with ``--no-labels``."""
    round_to: int = MULTIPLE
    """Widths are rounded to multiples of this number of channels. The dense width is always allowed."""
    amp: bool = False
    """Whether to train under bfloat16 autocast."""
    reporter: Reporter = SILENT
    all_merged_costs: CostTable | None = None
    """FLOPs with maximum token merging. None if no tokens are merged."""
    merges_must_pay: bool = False
    """Whether tokens are merged only if that saves time and divergence, as with ``--scope auto``."""
    preserved: Preserved | None = None
    """Outputs that the slim model must preserve. None for the model's own outputs."""
    merged: tuple[int, ...] = ()
    """Number of tokens that each block of the slim model merges, set after the search. ``table`` counts these
    merges. ``model`` never merges."""
    unmerge: Unmerge = False
    """Whether the slim model copies each merged token back to its patches in the features it returns."""
    class_token: bool = False
    """Whether the preserved outputs depend on the class token of the last block, and on no other token."""
    constraints: Constraints = NO_CONSTRAINTS
    """User constraints on widths, such as ``--exclude``, for the allocations ``curves`` and ``uniform``."""
    extra_images: Dataset[Sample] | None = None
    """Images for tuning beyond the calibration images, [C, H, W] each, read on demand."""
    workers: int = 0
    """Number of processes that read ``extra_images``; 0 for images in memory."""
    teacher_cache: list[tuple[Tensor, Tensor]] | None = None
    """Logits of the dense model for the first tuning batches, which several budgets share. None for 1
    budget."""

    @property
    def input_size(self) -> tuple[int, ...]:
        """[C, H, W] of an image, or [N, C] of its tokens."""
        return tuple(self.images.shape[1:])

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def choices(self) -> dict[UnitKey, tuple[int, ...]]:
        """Possible widths of each unit, ascending. The last is the dense width."""
        return {unit.key: width_choices(unit.width, self.round_to) for unit in self.units}

    @cached_property
    def allowed(self) -> dict[UnitKey, tuple[int, ...]]:
        """Widths in :attr:`choices` that satisfy the constraints."""
        return self.constraints.allowed(self.choices)

    @property
    def least_widths(self) -> dict[UnitKey, int]:
        return {key: widths[0] for key, widths in self.allowed.items()}

    @property
    def dense(self) -> bool:
        """Whether the features of all tokens are preserved."""
        return self.preserved is not None and self.preserved.dense

    @property
    def merges_tokens(self) -> bool:
        """Whether token merging and channel pruning share the budget."""
        return self.all_merged_costs is not None

    def limits_on_widths(self, limits: Limits, table: CostTable | None = None) -> Limits:
        """Return ``limits`` on the widths for the token merging of ``table``, by default the job's table.

        If there are other limits, a FLOPs limit that the uncut model meets is dropped to save search time.
        """
        merges = table is not None and table is not self.table
        cost = (table or self.table).flops
        fixed = [(limit.resource, limit.with_merges_fixed(cost, merges=merges)) for limit in limits]
        flops = [limit for resource, limit in fixed if resource == "flops"]
        others = [limit for resource, limit in fixed if resource != "flops"]
        return others if others and all(limit.holds({}) for limit in flops) else [*flops, *others]

    def calibrate(self, processes: Processes | None = None) -> Calibration:
        options, fisher_images = self.options, 0
        if options.allocation == "curves" or options.repair:
            fisher_images = min(FISHER_IMAGES, len(self.images) - held_out_count(len(self.images)))
        self.reporter.start("calibrating")
        return calibrate(
            self.model,
            self.prunable,
            self.images,
            batch_size=options.batch_size,
            preserved=self.preserved,
            fisher_images=fisher_images,
            seed=options.seed,
            token_importance=options.token_weights,
            reporter=self.reporter,
            processes=processes,
        )

    def distillation(self, calibration: Calibration) -> Distillation:
        """Return the calibration images with the dense model's outputs, held-out images first."""
        preserved = calibration.preserved
        labels = self.labels if preserved.metric == "answers" else None  # features are no classes
        return Distillation(
            self.images, calibration.teacher, labels, self.options, preserved=preserved, amp=self.amp
        )

    def held_out(self, calibration: Calibration) -> Distillation:
        """Return the held-out part of :meth:`distillation`. With a single image: this image."""
        return self.distillation(calibration).part(0, max(calibration.held, 1))

    def training(self, calibration: Calibration) -> Distillation:
        return self.distillation(calibration).part(calibration.held, None)
