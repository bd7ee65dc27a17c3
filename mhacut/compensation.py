"""A decision made real on the dense model: bases rotated, readers refitted, removed channels dead."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mhacut.calibration import Calibration
from mhacut.options import SearchOptions
from mhacut.plan import Plan
from mhacut.reduction import Reduction
from mhacut.repair import UnitRepair, repair
from mhacut.reweight import plan_gains
from mhacut.surgery import Anatomy, UnitKey, rotate


@dataclass(frozen=True)
class Decision:
    """What is to be cut."""

    plan: Plan
    ways: Mapping[UnitKey, tuple[Reduction, ...]] | None = None
    """How each unit may shrink to the plan's widths; None where the plan's channels are meant."""
    gains: Mapping[UnitKey, Tensor] | None = None
    """Trained beside the plan, [heads, dense width] per unit; heeded without repair only."""


@dataclass(frozen=True)
class Compensation:
    """A plan ready to be cut."""

    model: nn.Module
    """Of the dense shape, on the device of the dense one."""
    plan: Plan
    """The decision's widths, with the channels and bases that were chosen."""
    gains: Mapping[UnitKey, Tensor]
    """For :func:`mhacut.surgery.cut`."""
    repairs: Mapping[UnitKey, UnitRepair]
    """Per unit that was cut; empty without repair."""


def compensate(
    dense: nn.Module, anatomy: Anatomy, decision: Decision, calibration: Calibration, options: SearchOptions
) -> Compensation:
    """Make up for what ``decision`` removes, on a copy of ``dense``.

    Args:
        dense: eval mode, float32; left as it is.
        anatomy: of ``dense``.
        decision: what goes.
        calibration: of ``dense``.
        options: ``repair`` and ``temperature`` are heeded.
    """
    model = copy.deepcopy(dense)
    if options.repair:
        repairs = repair(
            model,
            anatomy,
            decision.plan,
            calibration.moments,
            temperature=options.temperature,
            ways=decision.ways,
        )
        plan = Plan(tuple(repairs[unit.key].plan if unit.key in repairs else unit for unit in decision.plan))
        # Refits hold their own factors and temperature.
        return Compensation(model, plan, plan_gains(anatomy, plan, None, "dense"), repairs)
    plan = decision.plan
    if decision.ways is not None:
        plan = Plan(tuple(decision.ways[unit.key][0].plan(unit.width) for unit in plan))
        for unit in plan:
            rotation = decision.ways[unit.key][0].rotation
            if rotation is not None and not unit.keeps_all:
                rotate(model.get_submodule(unit.layer), anatomy.unit(unit.key), rotation)
    return Compensation(model, plan, plan_gains(anatomy, plan, decision.gains, options.temperature), {})
