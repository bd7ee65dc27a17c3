"""Plans that any property must hold for, and properties that every class is held to alike."""

from __future__ import annotations

import copy

import torch
from models import relative
from torch import Tensor, nn

from mhacut.plan import Plan, UnitPlan
from mhacut.surgery import Anatomy, cut, dissect


def random_plan(anatomy: Anatomy, seed: int) -> tuple[Plan, dict]:
    """Any widths; any channels, each head its own, in shared units by a coin; and gains on what is kept."""
    generator = torch.Generator().manual_seed(seed)
    units, gains = [], {}
    for unit in anatomy.units():
        width = int(torch.randint(1, unit.width + 1, (), generator=generator))
        rows = [
            torch.randperm(unit.width, generator=generator)[:width].sort().values for _ in range(unit.heads)
        ]
        own = not unit.shares or (unit.can_unshare and bool(torch.randint(2, (), generator=generator)))
        kept = torch.stack(rows if own else rows[:1] * unit.heads)
        chosen = tuple(map(tuple, kept.tolist()))
        units.append(UnitPlan(unit.layer, unit.kind, unit.width, chosen, unshared=own and unit.can_unshare))
        gain = torch.zeros(unit.heads, unit.width, dtype=torch.float64)
        gains[unit.key] = gain.scatter(1, kept, 0.5 + torch.rand(kept.shape, generator=generator).double())
    return Plan(tuple(units)), gains


def keep_everything(anatomy: Anatomy) -> Plan:
    return Plan(tuple(UnitPlan.keep_all(u.layer, u.kind, u.heads, u.width) for u in anatomy.units()))


def difference_of_kernels(model: nn.Module, x: Tensor) -> float:
    """Between attention that is fused and attention that is not."""
    outputs = []
    for fused in (True, False):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        outputs.append(model(x))
    return relative(*outputs)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def difference_of_two_cuts_and_one(model: nn.Module, x: Tensor, seed: int) -> float:
    """Between a model that is cut twice and one cut at once, as a file tells it; their shapes must agree."""
    dense = copy.deepcopy(model)
    first, _ = random_plan(dissect(model), seed)
    cut(model, first)
    second, _ = random_plan(dissect(model), seed + 1)
    cut(model, second)
    cut(dense, Plan.from_json(second.after(first).to_json()))
    assert shapes(model) == shapes(dense)
    return relative(model(x), dense(x))
