"""Result of ``mhacut prune``: figures, a verdict in one sentence, and advice where much is lost."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

from torch import nn

from mhacut.checkpoint.preprocessing import Provenance
from mhacut.commands.prune_attempt import Attempt, TargetResult
from mhacut.commands.prune_inputs import Output
from mhacut.commands.prune_targets import KL_PER_POINT, Amount, Targets
from mhacut.data import Preprocessing
from mhacut.errors import CheckpointError, option_name
from mhacut.measuring.accuracy import Fidelity, Figure, ModelFigures
from mhacut.measuring.latency import latency_conditions
from mhacut.options.base import IN_MEMORY, PathLike
from mhacut.options.prune import BOUNDS
from mhacut.plan import Plan, UnitKey
from mhacut.pruning.curves import Curve
from mhacut.pruning.paper.indicators import SearchStep
from mhacut.pruning.planner import Planner
from mhacut.pruning.preserve import OutputMetric
from mhacut.pruning.repair import UnitRepair
from mhacut.report.choices import Choice, choice_charts, choice_rows, html_lines, html_table
from mhacut.surgery.tokens import why_not_merged
from mhacut.text import safe, safe_table

MUCH_POINTS, MUCH_NATS = 5.0, 0.5
"""Loss in points of top-1, and KL divergence in nats, above which the verdict is a warning."""
_STEP = 5
"""Step between the budgets that advice considers, in percent of the dense FLOPs."""
_PARAMS = "60%"
"""Advised value of ``--params`` if token merging saved most FLOPs, so that the file stayed large."""

_SHARED = ("data_dir", "dataset", "class_map", "train_split", "val_split", "labels")
"""Data options that ``mhacut prune`` and ``mhacut finetune`` both have, for advised commands."""
_DIVERGENCE: Mapping[OutputMetric, tuple[str, str]] = {
    "answers": ("KL to dense", "nats"),
    "features": ("error of features", "of their variance"),
    "dense": ("divergence of features", "nats per token"),
}
"""Name and unit of the divergence in texts, by metric."""


@dataclass(kw_only=True)
class PruneResult:
    """Result of :func:`prune`."""

    output: Path | None
    """Path of the written slim file or folder. None after a dry run."""
    architecture: str
    plan: Plan
    """Channels that each layer keeps, as indices in the input model, and merged tokens."""
    budget: int
    """Largest allowed FLOPs. Without a budget of FLOPs, the FLOPs of the dense model."""
    dense: ModelFigures
    """Accuracy, FLOPs, parameters, latency and size of the input model."""
    slim: ModelFigures
    """Accuracy, FLOPs, parameters, latency and size of the slim model."""
    data: str
    """Description of the calibration images for users."""
    preprocessing: Preprocessing
    """Preprocessing of calibration and validation images. The slim file stores the same values."""
    provenance: Provenance
    """Origin of each value in ``preprocessing``: an option, the checkpoint or a default."""
    not_prunable: tuple[str, ...]
    """Layers or parts of layers that were not pruned, each with the reason."""
    repairs: Mapping[UnitKey, UnitRepair] = field(default_factory=dict)
    """Result of the least-squares refit for the q/k, v or hidden channels of each layer. Empty with
    ``repair=False``."""
    device: str
    latency_batch_size: int
    """Number of images per batch in latency measurements."""
    timing: Mapping[str, Any]
    """Conditions of the latency measurements: ``runtime``, ``int8``, ``batch_size``, ``device``, CPU
    ``threads``, ``machine``. Empty if no latency was measured."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall time in seconds, by stage. Stages that several budgets share count for the first budget."""
    log: tuple[SearchStep, ...] = ()
    """State at each training step of the indicators (learned importance of channels). Empty except with
    ``--method paper``."""
    curves: Mapping[UnitKey, Curve] = field(default_factory=dict)
    """Estimated KL divergence in nats by width, for the q/k, v or hidden channels of each layer. Empty if
    widths were chosen without curves."""
    report: Path | None = None
    """Path of the HTML report. None without ``--report``."""
    fidelity: Fidelity
    """Similarity of the slim model's outputs to the dense model's outputs. Measured on validation images, or
    without validation images on held-out calibration images, which also selected the ridge parameter of the
    refit."""
    metric: OutputMetric
    """Metric of :attr:`divergence`: KL divergence in nats (``answers``), squared error of pooled features
    over their variance (``features``), or divergence of dense features in nats per token (``dense``)."""
    preserved: Mapping[str, Any]
    """Preserved outputs: ``what`` is the value of ``--preserve``. ``layers`` or ``levels`` lists the
    preserved layers or levels."""
    targets: tuple[TargetResult, ...] = ()
    """Budgets and bounds on the loss, with the amounts that the slim model reached."""
    advice: tuple[str, ...] = ()
    """Advice for losing less accuracy or for a smaller file, 1 sentence each."""
    _model: nn.Module | None = field(default=None, compare=False)
    _files: Output | None = field(default=None, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the model when pickled: other processes open the file."""
        return {**vars(self), "_model": None}

    @property
    def divergence(self) -> float:
        """Divergence of the slim model's outputs from the dense model's, in the unit of :attr:`metric`."""
        return self.fidelity.divergence

    @property
    def much_lost(self) -> bool:
        """Whether a classifier lost over 5 points of top-1 or 0.5 nats. False with a bound on the loss."""
        if self.metric != "answers" or any(target.name in BOUNDS for target in self.targets):
            return False
        before, after = self.dense.evaluation, self.slim.evaluation
        lost = 0.0 if before is None or after is None else before.top1 - after.top1
        return lost > MUCH_POINTS or not self.divergence <= MUCH_NATS  # it may be no number

    @property
    def _slower(self) -> bool:
        before, after = self.dense.latency_ms, self.slim.latency_ms
        return before is not None and after is not None and round(after / before, 1) > 1

    @property
    def verdict(self) -> str:
        """Summary in 1 line: accuracy or similarity, FLOPs, speed and file size."""
        dense, slim = self.dense, self.slim
        if dense.evaluation is not None and slim.evaluation is not None:
            quality = f"top-1 {slim.evaluation.top1:.1f} % (dense {dense.evaluation.top1:.1f} %)"
        elif (same := self.fidelity.agreement) is not None:
            images = self.fidelity.judged_on
            quality = (
                f"same top-1 class as dense for {100 * same:.1f} % of {images} (KL {self.divergence:.2g})"
            )
        else:
            error = self.figures()[-1]
            quality = f"{error.name} {error.text(error.slim)} {error.unit} {error.conditions}"
        percent = 100 * slim.flops / dense.flops
        parts = [f"{quality} at {percent:.0f} % of the FLOPs"]
        if _mostly_merged(self):
            parts.append("mostly by token merging")
        if dense.latency_ms is not None and slim.latency_ms is not None:
            speedup = dense.latency_ms / slim.latency_ms
            change = f"{speedup:.1f}x faster" if speedup >= 1 else f"{1 / speedup:.1f}x slower"
            parts.append(f"{change} {latency_conditions(self.timing)}")
        if _mostly_merged(self) or any(target.name in ("params", "size") for target in self.targets):
            smaller = round(100 * _file_saved(self))
            parts.append(f"file {smaller} % smaller" if smaller > 0 else "file size unchanged")
        return ", ".join(parts)

    def verdict_lines(self) -> list[str]:
        """Return the verdict (a warning if much accuracy is lost), and 1 line per advice."""
        warning = "warning: large loss: " * self.much_lost or "warning: slower than dense: " * self._slower
        return [warning + self.verdict, *(f"  {line}" for line in self.advice)]

    def figures(self) -> list[Figure]:
        """Return the measured values of both models. The divergence comes last."""
        dense, slim, fidelity = self.dense, self.slim, self.fidelity
        before, after = dense.evaluation, slim.evaluation
        same = None if fidelity.agreement is None else 100 * fidelity.agreement
        conditions = latency_conditions(self.timing) if self.timing else ""
        divergence, unit = _DIVERGENCE[self.metric]
        figures = [
            Figure("FLOPs", dense.flops, slim.flops, ""),
            Figure("parameters", dense.parameters, slim.parameters, ""),
            Figure("latency", dense.latency_ms, slim.latency_ms, "ms", conditions),
            Figure("file", dense.size, slim.size, "B"),
            Figure("same as dense", None, same, "%", f"of {fidelity.judged_on}"),
            Figure(divergence, None, self.divergence, unit, f"({fidelity.judged_on})"),
        ]
        if before is not None and after is not None:
            figures.insert(0, Figure("top-1", before.top1, after.top1, "%", after.judged_on))
        return [figure for figure in figures if figure.slim is not None]

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return the measured values as table rows of (name, dense, slim, ratio).

        The first row has headings.
        """
        return [(self.architecture, "dense", "slim", "ratio"), *(figure.row() for figure in self.figures())]

    def __repr__(self) -> str:
        lines = [*map(safe, self.verdict_lines()), "", safe_table(self.rows(), self._notes())]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html_lines(self.verdict_lines()) + html_table(self.rows(), self._notes())

    def _notes(self) -> list[str]:
        saved = "dry run: no model was written" if self.output is None else f"saved {self.output}"
        return [saved, f"searched on {self.data}"]

    def model(self) -> nn.Module:
        """Return a new copy of the pruned model, in eval mode, float32, on the CPU; also after a dry run.

        Raises:
            CheckpointError: after a dry run in several processes, only the first process has the model.
        """
        if self._model is None:
            if self.output is None:
                raise CheckpointError(
                    "after a dry run, only process 0 has the model: call model() in process 0"
                )
            return self.files.open(self.output)
        return copy.deepcopy(self._model).requires_grad_(True)

    def save(self, file: PathLike, *, overwrite: bool = False) -> None:
        """Write the pruned model as a slim file, for example after a dry run.

        Args:
            file: the file; its folder is created.
            overwrite: replace an existing file.

        Raises:
            OutputError: the file must not or cannot be written.
        """
        self.files.write(file, self.model(), overwrite=overwrite)

    @property
    def files(self) -> Output:
        assert self._files is not None  # results in tests have none
        return self._files


class PruneResults(tuple[PruneResult, ...]):
    """Results of several budgets, shown as a table and charts in notebooks."""

    __slots__ = ()

    def rows(self) -> list[list[str]]:
        return choice_rows(self.choices())

    def __repr__(self) -> str:
        return safe_table(self.rows(), self._notes()) if self else "no results"

    def _repr_html_(self) -> str:
        charts = choice_charts(self.choices())
        return "".join([html_table(self.rows(), self._notes()), *charts])

    def warnings(self) -> list[str]:
        return [line for result in self if result.much_lost for line in result.verdict_lines()]

    def choices(self) -> list[Choice]:
        return [
            Choice(
                next(target.spec for target in result.targets if target.name == "flops"),
                result.figures(),
                "" if result.report is None else result.report.name,
            )
            for result in self
        ]

    def _notes(self) -> list[str]:
        return [f"judged on {self[0].fidelity.judged_on}", *self.warnings()]


def advice(result: PruneResult, targets: Targets, attempt: Attempt, planner: Planner) -> tuple[str, ...]:
    ways = list(_ways_to_lose_less(result, targets, attempt, planner)) if result.much_lost else []
    if result._slower and any(result.plan.tokens.merged):
        ways.append(f"{option_name('scope', 'attention+mlp')} merges no tokens and may be faster")
    alone = not (
        result.much_lost or any(target.name in ("params", "size", *BOUNDS) for target in targets.all)
    )
    if alone and _mostly_merged(result) and targets.inputs.options.as_ == "timm":
        ways.append(f"add {option_name('params', _PARAMS)} for a smaller file")
    return tuple(ways)


def _mostly_merged(result: PruneResult) -> bool:
    """Whether token merging, which leaves the file size unchanged, saved most of the FLOPs."""
    saved = 1 - result.slim.flops / result.dense.flops
    return any(result.plan.tokens.merged) and _file_saved(result) < saved / 2


def _file_saved(result: PruneResult) -> float:
    sizes = result.dense.size, result.slim.size
    return 1 - sizes[1] / sizes[0] if sizes[0] and sizes[1] else 0.0


def _ways_to_lose_less(
    result: PruneResult, targets: Targets, attempt: Attempt, planner: Planner
) -> Iterator[str]:
    inputs, job = targets.inputs, targets.inputs.job
    options, by_curves = inputs.options, bool(attempt.planned.curves)
    merged = job.merges_tokens or any(job.merged) or options.keep_dead_tokens
    if by_curves and options.bounds_work and not (merged or why_not_merged(inputs.source.model)):
        yield f"{option_name('scope', 'attention+mlp+tokens')} also merges tokens and may lose much less"
    if by_curves and (budget := _milder(result, targets, attempt, planner)):
        yield f"{budget} should lose about 1 point of top-1"
    if options.has_images and options.checkpoint != IN_MEMORY and result.output is not None:
        named = {"teacher": options.checkpoint, "teacher_part": options.part}
        named |= {name: getattr(options, name) for name in _SHARED if name in options.changed()}
        given = [option_name(name, value) for name, value in named.items() if value is not None]
        if given[0].startswith("-"):
            yield f"mhacut finetune {quote(str(result.output))} {' '.join(given)} recovers part of the loss"
        else:
            yield f"mhacut.finetune({str(result.output)!r}, {', '.join(given)}) recovers part of the loss"
    if options.effort != "best" and by_curves:
        yield f"{option_name('effort', 'best')} takes longer and loses less"
    images, wanted = len(inputs.source.images.images), options.work.calibration_images
    if inputs.source.images.synthetic:
        yield f"{option_name('data_dir')} with your own images loses less than synthetic images"
    elif images < wanted:
        yield f"use more calibration images: found {images}, the default is {wanted}"


def _milder(result: PruneResult, targets: Targets, attempt: Attempt, planner: Planner) -> str:
    """Return the option with the smallest budget whose expected loss is about 1 point of top-1 accuracy.

    Expected losses are scaled by the ratio of measured to predicted loss. The KL divergence of 1 point is
    measured too if images have labels. Empty if no budget below the dense model suffices.
    """
    if len(targets.all) != 1 or len(attempt.limits) != 1:
        return ""
    (target,), (limit,) = targets.all, attempt.limits
    assert isinstance(target, Amount)
    factor = result.divergence / max(planner.expected_divergence((limit,)), 1e-9)
    before, after = result.dense.evaluation, result.slim.evaluation
    nats_per_point = KL_PER_POINT
    if before is not None and after is not None and before.top1 > after.top1 + 1:
        nats_per_point = result.divergence / (before.top1 - after.top1)

    def mild(percent: int) -> bool:
        most = int(percent / 100 * target.dense)
        return factor * planner.expected_divergence((replace(limit, most=most),)) <= nats_per_point

    now = 100 * limit.most / target.dense
    percents = range(_STEP * int(now / _STEP + 1), 100, _STEP)
    index = bisect_left(percents, True, key=mild)
    return option_name(target.name, f"{percents[index]}%") if index < len(percents) else ""
