"""Making up for what a plan removes: repair in closed form, then reweight gains trained on top."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mhacut.distillation import Distillation
from mhacut.options import SearchOptions
from mhacut.plan import Plan
from mhacut.repair import UnitRepair, repair
from mhacut.reweight import plan_gains, train_gains
from mhacut.search import SearchResult
from mhacut.surgery import Anatomy, UnitKey


@dataclass(frozen=True)
class Compensation:
    """A plan ready to be cut."""

    model: nn.Module
    """Of the dense shape, on the device of the dense one; the dense one itself without repair."""
    plan: Plan
    """The search's widths; its channels or those that repair chose."""
    gains: Mapping[UnitKey, Tensor]
    """For :func:`mhacut.surgery.cut`."""
    repairs: Mapping[UnitKey, UnitRepair]
    """Per unit that was cut; empty without repair."""


def compensate(
    dense: nn.Module,
    anatomy: Anatomy,
    found: SearchResult,
    lesson: Distillation,
    options: SearchOptions,
    *,
    start_stage: Callable[[str], None],
    progress: Callable[[int, int, str], None],
) -> Compensation:
    """Repair a copy of ``dense`` for what the search found and train gains on it, as ``options`` say.

    Args:
        dense: eval mode, float32; left as it is.
        anatomy: of ``dense``.
        found: by the search.
        lesson: what the gains are taught; its images are those that repair fits.
        options: which of both to do, and how.
        start_stage: called with the name of each stage as it begins.
        progress: called with (done, in all, detail) during a stage.
    """
    model, plan, temperature = dense, found.plan, options.temperature
    start = found.gains if options.reweight else None
    repairs: Mapping[UnitKey, UnitRepair] = {}
    if options.repair:
        start_stage("repairing")
        model = copy.deepcopy(dense)
        repairs = repair(
            model,
            anatomy,
            plan,
            lesson.images,
            stages=options.repair_stages,
            batch_size=options.batch_size,
            temperature=temperature,
            reselect=options.selection == "repair",
            progress=lambda done, total: progress(done, total, ""),
        )
        plan = Plan(tuple(repairs[unit.key].plan if unit.key in repairs else unit for unit in plan))
        # Repair has put its own factors and temperature into the weights; gains start anew from there.
        start, temperature = None, "dense"
    if options.gain_steps == 0:
        return Compensation(model, plan, plan_gains(anatomy, plan, start, temperature), repairs)
    start_stage("reweighting")
    gains = train_gains(
        model,
        anatomy,
        plan,
        start,
        lesson,
        steps=options.gain_steps,
        lr=options.gain_lr,
        temperature=temperature,
        progress=lambda done, total, loss: progress(done, total, f"loss {loss:.4f}"),
    )
    return Compensation(model, plan, gains, repairs)
