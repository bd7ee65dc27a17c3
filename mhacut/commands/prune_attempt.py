"""A plan that is tried: its model is cut, recovered, and measured against the targets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from mhacut.budget import format_amount
from mhacut.commands.prune_validation import Predictions, Validation
from mhacut.errors import option_name
from mhacut.pruning.check import check_exact, check_flops, masked_outputs
from mhacut.pruning.limits import Limits
from mhacut.pruning.planner import Planned, Planner
from mhacut.pruning.recover import recover
from mhacut.surgery.costs import Dtypes, round_to_stored
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.slice import cut

CHECK_IMAGES = 4
"""Number of images for comparing the cut model and the written model with the plan."""
TIMING_SECONDS = 3.0
"""Seconds of latency measurement after the warm-up."""


@dataclass(frozen=True)
class TargetResult:
    """A target and the amount that the slim model reached."""

    name: str
    """Name of the option that set the target, such as ``flops``."""
    spec: str
    """Text as the user wrote it."""
    limit: float
    """Largest allowed amount: FLOPs, parameters, bytes, milliseconds, nats, or points."""
    reached: float
    standard_error: float | None = None
    """Standard error of ``reached``, if images were sampled."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """For a latency budget: conditions of the measurement, and the predicted time."""
    labels: tuple[str, str] = ("", "")
    """``limit`` and ``reached`` as text with units."""
    amount: int = 0
    """Exact amount of a budget in its unit, for example nanoseconds; 0 for a bound on the loss."""

    @property
    def ratio(self) -> float:
        """Reached amount divided by the limit. The target is met at 1 or less."""
        if self.reached <= 0:
            return 0.0
        return self.reached / self.limit if self.limit else math.inf

    @property
    def text(self) -> str:
        limit, reached = self.labels
        return f"{option_name(self.name, self.spec)}: {reached} of at most {limit}"

    def with_size(self, size: int) -> TargetResult:
        """Return the result for the written file, whose size the search bounds from above."""
        if self.name != "size":
            return self
        return replace(self, reached=size, labels=(self.labels[0], format_amount(size, "size")))

    def to_json(self) -> dict[str, Any]:
        error = {} if self.standard_error is None else {"standard_error": self.standard_error}
        return {
            "target": self.name,
            "asked": self.spec,
            "most": self.limit,
            "reached": self.reached,
            **error,
            **self.measured,
        }


@dataclass
class Attempt:
    """A plan and the model cut by the plan."""

    number: int
    """Number of plans so far, including this plan."""
    limits: Limits
    """Limits of the plan."""
    planned: Planned
    model: nn.Module
    """The cut model. Recovery adds token merging and trains the weights."""
    masked: Tensor
    """Outputs of the dense model with masked channels, for the first calibration images."""
    reached: tuple[TargetResult, ...] = ()
    _predictions: Predictions | None = None

    def predictions(self, validation: Validation, model: nn.Module) -> Predictions | None:
        """Return the predictions of ``model``, the slim model, computed at the first call."""
        if self._predictions is None:
            self._predictions = validation.predictions_of(model)
        return self._predictions

    @property
    def worst_ratio(self) -> float:
        """Largest ratio of all targets. All targets are met if it is at most 1."""
        return max(result.ratio for result in self.reached)

    @property
    def flops_limit(self) -> int | None:
        """FLOPs that the plan may have; None without a limit on FLOPs."""
        return min((limit.most for limit in self.limits if limit.resource == "flops"), default=None)


def cut_model(planned: Planned, limits: Limits, number: int, planner: Planner) -> Attempt:
    """Cut the model of ``planned`` in place: a copy would take as much memory as the dense model."""
    planner.reporter.start("cutting")
    ready, job = planned.ready, planner.job
    model = ready.model.cpu()
    masked = masked_outputs(job, ready, job.images[:CHECK_IMAGES])
    cut(model, ready.plan, ready.channel_scales, job.prunable)
    return Attempt(number, limits, planned.without_model(), model, masked)


def recover_model(attempt: Attempt, dtypes: Dtypes, planner: Planner) -> None:
    """Check the cut model and recover its accuracy. Tensors are rounded to the dtypes of the file."""
    job, planned = planner.job, attempt.planned
    # Masked and sliced are compared before training, which changes what the slim model computes.
    most = attempt.flops_limit
    check_flops(attempt.model, job, planned, job.table.dense if most is None else most)  # 5. check
    check_exact(attempt.model, attempt.masked, job.images[:CHECK_IMAGES])
    layers = find_prunable_layers(attempt.model)
    known = {layer.name for layer in job.prunable.layers}
    others = [layer.name for layer in layers.layers if layer.name not in known]
    learning = layers.without(others, "does not run for what is preserved")
    slim = recover(attempt.model, learning, job, planner.calibration, planned.merged)  # 6. recover
    round_to_stored(slim, dtypes)
    attempt.model = slim
