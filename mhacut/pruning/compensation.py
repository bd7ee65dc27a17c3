"""A decision made real on the dense model: bases rotated, readers refitted, removed channels dead."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mhacut.options.prune import SearchOptions
from mhacut.plan import Plan
from mhacut.pruning.calibrate import Calibration
from mhacut.pruning.candidates import Candidate
from mhacut.pruning.channel_scales import plan_channel_scales
from mhacut.pruning.repair import UnitRepair, repair
from mhacut.surgery.find import PrunableLayers, UnitKey
from mhacut.surgery.rotate import rotate


@dataclass(frozen=True)
class Decision:
    """What is to be cut."""

    plan: Plan
    candidates: Mapping[UnitKey, tuple[Candidate, ...]] | None = None
    """How each unit may shrink to the plan's widths; None where the plan's channels are meant."""
    channel_scales: Mapping[UnitKey, Tensor] | None = None
    """Trained beside the plan, [heads, dense width] per unit; heeded without repair only."""


@dataclass(frozen=True)
class Compensation:
    """A plan ready to be cut."""

    model: nn.Module
    """Of the dense shape, on the device of the dense one."""
    plan: Plan
    """The decision's widths, with the channels and bases that were chosen."""
    channel_scales: Mapping[UnitKey, Tensor]
    """For :func:`mhacut.surgery.slice.cut`."""
    repairs: Mapping[UnitKey, UnitRepair]
    """Per unit that was cut; empty without repair."""


def compensate(
    dense: nn.Module,
    prunable: PrunableLayers,
    decision: Decision,
    calibration: Calibration,
    options: SearchOptions,
) -> Compensation:
    """Make up for what ``decision`` removes, on a copy of ``dense``.

    Args:
        dense: eval mode, float32; left as it is.
        prunable: of ``dense``.
        decision: what goes.
        calibration: of ``dense``.
        options: ``repair`` and ``temperature`` are heeded.
    """
    model = copy.deepcopy(dense)
    if options.repair:
        repairs = repair(
            model,
            prunable,
            decision.plan,
            calibration.moments,
            temperature=options.temperature,
            candidates=decision.candidates,
        )
        plan = Plan(tuple(repairs[unit.key].plan if unit.key in repairs else unit for unit in decision.plan))
        # Refits hold their own factors and temperature.
        return Compensation(model, plan, plan_channel_scales(prunable, plan, None, "dense"), repairs)
    plan = decision.plan
    if decision.candidates is not None:
        plan = Plan(tuple(decision.candidates[unit.key][0].plan(unit.width) for unit in plan))
        for unit in plan:
            rotation = decision.candidates[unit.key][0].rotation
            if rotation is not None and not unit.keeps_all:
                rotate(model.get_submodule(unit.layer), prunable.unit(unit.key), rotation)
    return Compensation(
        model, plan, plan_channel_scales(prunable, plan, decision.channel_scales, options.temperature), {}
    )
