"""Pruning jobs of small models, and a reporter that remembers."""

from __future__ import annotations

from torch import Tensor, nn

from mhacut.options.prune import SearchOptions
from mhacut.plan import UNIT_KINDS
from mhacut.pruning.job import Job
from mhacut.pruning.limits import Limit, Limits
from mhacut.runtime.progress import SILENT, Reporter
from mhacut.surgery.costs import build_cost_table
from mhacut.surgery.find import PrunableLayers, find_prunable_layers


class Recorder:
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.stages: list[str] = []
        self.steps: list[tuple[int, int]] = []
        self.details: list[str] = []

    def log(self, message: str) -> None:
        self.messages.append(message)

    def start(self, stage: str) -> None:
        self.stages.append(stage)

    def advance(self, done: int, total: int, detail: str = "") -> None:
        self.steps.append((done, total))
        self.details.append(detail)


def job_of(
    model: nn.Module,
    images: Tensor,
    *,
    counted: bool = False,
    kinds=UNIT_KINDS,
    round_to: int = 8,
    labels: Tensor | None = None,
    prunable: PrunableLayers | None = None,
    reporter: Reporter = SILENT,
    options: SearchOptions | None = None,
) -> Job:
    """A job for ``model``, without a cost table unless its FLOPs are ``counted``."""
    prunable = prunable or find_prunable_layers(model)
    table = build_cost_table(model, prunable, tuple(images.shape[1:])) if counted else None
    return Job(
        model=model,
        prunable=prunable,
        units=prunable.units(kinds),
        table=table,
        images=images,
        labels=labels,
        options=options or SearchOptions(),
        round_to=round_to,
        reporter=reporter,
    )


def flops_limit(job: Job, share: float) -> Limits:
    return (Limit(job.table.flops, int(share * job.table.dense)),)
