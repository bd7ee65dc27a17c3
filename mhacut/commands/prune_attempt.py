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
"""Number of images for checking the outputs of the cut model and of the written file."""
TIMING_SECONDS = 3.0
"""Seconds for measuring the latency of the dense and the slim model, after the warm-up."""


@dataclass(frozen=True)
class TargetResult:
    """Target of the user, and the amount that the slim model reached."""

    name: str
    """Name of the option that set the target, such as ``flops``."""
    spec: str
    """Value of the option as the user wrote it, such as ``50%``."""
    limit: float
    """Largest allowed amount, in FLOPs, parameters, bytes, milliseconds, nats or points of top-1."""
    reached: float
    standard_error: float | None = None
    """Standard error of ``reached``. None if ``reached`` is exact or the error is unknown."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """For a latency budget: predicted time and conditions of the measurement. Empty for other targets."""
    labels: tuple[str, str] = ("", "")
    """Texts of ``limit`` and ``reached``, with units."""
    amount: int = 0
    """Exact amount as an integer: FLOPs, parameters, bytes or nanoseconds. 0 for a bound on the loss."""

    @property
    def ratio(self) -> float:
        """Reached amount divided by the limit. At most 1 if the target is met."""
        if self.reached <= 0:
            return 0.0
        return self.reached / self.limit if self.limit else math.inf

    @property
    def text(self) -> str:
        limit, reached = self.labels
        return f"{option_name(self.name, self.spec)}: {reached} of at most {limit}"

    def with_size(self, size: int) -> TargetResult:
        """Replace the predicted file size by the real ``size``, if the target is a size."""
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
    number: int
    """Number of plans tried so far, including this plan."""
    limits: Limits
    """Limits that the widths of the plan must meet."""
    planned: Planned
    model: nn.Module
    """Cut model. Recovery later adds token merging and trains the weights."""
    masked: Tensor
    """Outputs of the dense model with removed channels masked, for the first calibration images."""
    reached: tuple[TargetResult, ...] = ()
    _predictions: Predictions | None = None

    def predictions(self, validation: Validation, model: nn.Module) -> Predictions | None:
        """Return the predictions of ``model``, the complete slim model. The first result is cached."""
        if self._predictions is None:
            self._predictions = validation.predictions_of(model)
        return self._predictions

    @property
    def worst_ratio(self) -> float:
        """Largest ratio of reached amount to limit over all targets. At most 1 if all targets are met."""
        return max(result.ratio for result in self.reached)

    @property
    def flops_limit(self) -> int | None:
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
    """Check the cut model, then recover its accuracy. Weights are rounded to the dtypes of the file."""
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
