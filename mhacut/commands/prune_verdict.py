"""Verdict on a cut in one sentence, and what the user can do where much is lost."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from shlex import quote
from typing import TYPE_CHECKING

from mhacut.commands.prune_targets import KL_PER_POINT, Amount, Attempt, Params, Targets
from mhacut.errors import BudgetError, option_name
from mhacut.measuring.latency import latency_label
from mhacut.options.base import IN_MEMORY
from mhacut.options.prune import BOUNDS, EFFORTS
from mhacut.pruning.planner import Planner
from mhacut.surgery.tokens import why_not_merged

if TYPE_CHECKING:
    from mhacut.commands.prune_result import PruneResult

MUCH_POINTS, MUCH_NATS = 5.0, 0.5
"""Loss of top-1 in points, or KL divergence in nats, above which the verdict is a warning."""
_NAMED = {25: "a quarter of the FLOPs", 50: "half the FLOPs", 75: "three quarters of the FLOPs"}
_STEP = 5
"""Step in percent between the budgets that are tried in place of one that costs much."""
_PARAMS = "60%"
"""Budget of parameters that is proposed where merged tokens leave the file as large as it was."""

_SHARED = ("data_dir", "dataset", "class_map", "train_split", "val_split", "labels")
"""Options of the data that fine-tuning has too."""


def verdict(result: PruneResult) -> str:
    """Return what was kept and won, one sentence without a full stop."""
    dense, slim = result.dense, result.slim
    if dense.evaluation is not None and slim.evaluation is not None:
        kept = f"{slim.evaluation.top1:.1f} of {dense.evaluation.top1:.1f} % top-1"
    elif (same := result.fidelity.agreement) is not None:
        judged_on = result.fidelity.judged_on
        kept = f"the dense model's class for {100 * same:.1f} % of {judged_on}, KL {result.divergence:.2g},"
    else:
        label, _, value, _ = result.rows()[-1]  # error of features (64 images)
        kept = label.replace("(", f"{value} (")
    percent = 100 * slim.flops / dense.flops
    named = _NAMED.get(round(percent), f"{percent:.0f} % of the FLOPs")
    parts = [f"{kept} at {named}" + ", mostly by merging tokens" * _mostly_merged(result)]
    if dense.latency_ms is not None and slim.latency_ms is not None:
        conditions = latency_label(result.timing).partition("(")[2]
        parts.append(f"{dense.latency_ms / slim.latency_ms:.1f} times as fast ({conditions}")
    if _mostly_merged(result) or any(target.name in ("params", "size") for target in result.targets):
        smaller = round(100 * _file_saved(result))
        parts.append(f"the file is {f'{smaller} % smaller' if smaller > 0 else 'no smaller'}")
    return ", ".join(parts)


def much_lost(result: PruneResult) -> bool:
    """Whether a model of classes lost much, and nobody had set a bound on that."""
    if result.divergence_of != "answers" or any(target.name in BOUNDS for target in result.targets):
        return False
    before, after = result.dense.evaluation, result.slim.evaluation
    lost = 0.0 if before is None or after is None else before.top1 - after.top1
    return lost > MUCH_POINTS or not result.divergence <= MUCH_NATS  # it may be no number


def advice(result: PruneResult, targets: Targets, attempt: Attempt, planner: Planner) -> tuple[str, ...]:
    """Return what the user can do where much is lost, and where merged tokens leave the file as large."""
    ways = list(_ways_to_lose_less(result, targets, attempt, planner)) if much_lost(result) else []
    alone = not any(target.name in ("params", "size", *BOUNDS) for target in targets.all)
    if alone and _mostly_merged(result):
        try:
            Params(targets.inputs, _PARAMS)
        except BudgetError:
            pass  # out of reach
        else:
            ways.append(f"add {option_name('params', _PARAMS)} for a smaller file")
    return tuple(ways)


def _mostly_merged(result: PruneResult) -> bool:
    """Whether most of the FLOPs were saved by merging tokens, which leaves the file as large as it was."""
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
    if by_curves and options.bounds_work and not (merged or why_not_merged(inputs.loaded.model)):
        yield f"{option_name('scope', 'attention+mlp+tokens')} merges tokens too, which may lose far less"
    if by_curves and (budget := _milder(result.divergence, targets, attempt, planner)):
        yield f"{budget} should lose about one point"
    if options.has_images and options.checkpoint != IN_MEMORY and result.output is not None:
        named = {"teacher": options.checkpoint, "teacher_part": options.part}
        named |= {name: getattr(options, name) for name in _SHARED if name in options.changed()}
        given = [option_name(name, value) for name, value in named.items() if value is not None]
        if given[0].startswith("-"):
            yield f"mhacut finetune {quote(str(result.output))} {' '.join(given)} recovers some of it"
        else:
            yield f"mhacut.finetune({str(result.output)!r}, {', '.join(given)}) recovers some of it"
    if options.effort != "best" and by_curves:
        yield f"{option_name('effort', 'best')} takes longer and loses less"
    images, wanted = len(inputs.images.images), EFFORTS[options.effort].calibration_images
    if inputs.images.synthetic:
        yield f"{option_name('data_dir')}: images of your own, in place of synthetic ones"
    elif images < wanted:
        yield f"more images: {images} were used, {wanted} are usual"


def _milder(divergence: float, targets: Targets, attempt: Attempt, planner: Planner) -> str:
    """Return the budget, in steps, at which about one point is expected to be lost; empty if there is none.

    The loss that the curves predict is scaled by what was measured, relative to the prediction, at this one.
    """
    if len(targets.all) != 1 or len(attempt.limits) != 1:
        return ""
    (target,), (limit,) = targets.all, attempt.limits
    assert isinstance(target, Amount)
    factor = divergence / max(planner.expected_divergence((limit,)), 1e-9)

    def mild(percent: int) -> bool:
        most = int(percent / 100 * target.dense)
        return factor * planner.expected_divergence((replace(limit, most=most),)) <= KL_PER_POINT

    now = 100 * limit.most / target.dense
    percents = range(_STEP * int(now / _STEP + 1), 100, _STEP)
    index = bisect_left(percents, True, key=mild)
    return option_name(target.name, f"{percents[index]}%") if index < len(percents) else ""
