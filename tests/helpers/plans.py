"""Plans to try a cut with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mhacut.options.prune import SearchOptions
from mhacut.plan import Plan, UnitPlan
from mhacut.pruning.distill import Distillation
from mhacut.surgery.channels import axes_of, channels_of, set_channels
from mhacut.surgery.find import PrunableLayers


def random_plan(prunable: PrunableLayers, seed: int) -> tuple[Plan, dict]:
    """Any widths; any channels, each head its own, in shared units by a coin; and scales on what is kept."""
    generator = torch.Generator().manual_seed(seed)
    units, channel_scales = [], {}
    for unit in prunable.units():
        width = int(torch.randint(1, unit.width + 1, (), generator=generator))
        rows = [
            torch.randperm(unit.width, generator=generator)[:width].sort().values for _ in range(unit.heads)
        ]
        own = unit.sharing == "own" or (
            unit.sharing == "copied" and bool(torch.randint(2, (), generator=generator))
        )
        kept = torch.stack(rows if own else rows[:1] * unit.heads)
        chosen = tuple(map(tuple, kept.tolist()))
        units.append(
            UnitPlan(unit.layer, unit.kind, unit.width, chosen, unshared=own and unit.sharing == "copied")
        )
        channel_scale = torch.zeros(unit.heads, unit.width, dtype=torch.float64)
        channel_scales[unit.key] = channel_scale.scatter(
            1, kept, 0.5 + torch.rand(kept.shape, generator=generator).double()
        )
    return Plan(tuple(units)), channel_scales


def keep_everything(prunable: PrunableLayers) -> Plan:
    return Plan(tuple(u.keep_first(u.width) for u in prunable.units()))


@torch.no_grad()
def kill(
    model: nn.Module, prunable: PrunableLayers, plan: Plan, revived: tuple[str, ...]
) -> dict[str, Tensor]:
    """Make zero what makes the removed channels, or what reads them where they are ``revived``.

    Constants, which a channel gives when it is zero, stay. Returns gates for channels that no zero
    among the parameters removes.
    """
    gates = {}
    for unit_plan in plan:
        unit, module = prunable.unit(unit_plan.key), model.get_submodule(unit_plan.layer)
        gone = torch.ones(unit.heads, unit.width, dtype=torch.bool)
        gone.scatter_(1, torch.tensor(unit_plan.kept), False)
        if unit.gate is not None:
            gates[f"{unit.layer}.{unit.gate}"] = (~gone).double().flatten()
            continue
        for axis in axes_of(unit):
            stays = axis in unit.constants or (axis.shared and unit_plan.unshared)
            if not stays and (axis == unit.output_projection) == (unit.kind in revived):
                channels = channels_of(module, unit, axis)
                first, last = (0, 1) if axis.shared else axis.heads or (0, unit.heads)
                channels[gone[first:last]] = 0
                set_channels(module, unit, axis, channels)
    return gates


def distillation_of(model: nn.Module, images: Tensor, batch_size: int = 8) -> Distillation:
    options = SearchOptions(batch_size=batch_size, seed=0)
    return Distillation(images, model(images), None, options)
