"""Checks of a pruned model: equality with the masked dense model, FLOPs, and the written file."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mhacut.errors import MhacutError
from mhacut.pruning.job import Job
from mhacut.pruning.planner import Planned
from mhacut.pruning.repair import ReconstructedModel
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.mask import masked_tensors, run_with
from mhacut.surgery.tokens import set_merged

EXACTNESS = 1e-3
"""Largest accepted relative difference between outputs of the masked dense model and of the cut model.
Rounding causes 1e-6 to 1e-4, growing with depth (docs/explanation/choices.md)."""
ROUNDING = 5e-2
"""The pruned model may have fewer FLOPs than planned by at most this fraction.
Models with few channels and tokens had 3 % fewer."""
REPEATABILITY = 1e-5
"""Largest accepted relative difference between outputs of 2 loads of the same model file."""


def check_flops(slim: nn.Module, job: Job, planned: Planned, most: int) -> None:
    if planned.merged:
        slim = copy.deepcopy(slim)
        set_merged(slim, planned.merged, planned.unmerge)
    # Counted by fvcore, which knows nothing of the cost table: a wrong table would break the promised budget.
    counted = measure_flops(slim, job.input_size)
    expected = int(planned.table.flops(planned.plan.widths()))
    # The table counts the class token's attention in merging blocks at the dense width.
    planned_well = expected * (1 - ROUNDING) <= counted <= expected
    if not planned_well or counted > most:
        wrong = f"more than the budget of {most}" if planned_well else f"not the planned {expected}"
        raise MhacutError(
            f"the pruned model has {counted} FLOPs, {wrong}; nothing was written. This is a bug in mhacut: "
            "please report the architecture and its arguments"
        )


@torch.no_grad()
def masked_outputs(job: Job, ready: ReconstructedModel, images: Tensor) -> Tensor:
    """Return the outputs of the dense-shaped model ``ready`` with removed channels masked."""
    return run_with(ready.model, masked_tensors(ready.model, job.prunable, ready.channel_scales), images)


@torch.no_grad()
def check_exact(slim: nn.Module, masked: Tensor, images: Tensor) -> None:
    """Check that the pruned model gives the same outputs as the masked model."""
    difference = relative_difference(slim(images), masked)
    if not difference <= EXACTNESS:
        raise MhacutError(
            f"outputs of the pruned model are wrong: relative error {difference:.1e}, expected at most "
            f"{EXACTNESS:g}; nothing was written. This is a bug in mhacut: "
            "please report the architecture and its arguments"
        )


@torch.no_grad()
def same_outputs(model: nn.Module, expected: nn.Module, images: Tensor) -> bool:
    """Return whether 2 copies of a model give the same outputs for ``images`` up to rounding."""
    return relative_difference(model(images), expected(images)) <= REPEATABILITY


def relative_difference(output: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference divided by the largest expected value."""
    return float((output - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
