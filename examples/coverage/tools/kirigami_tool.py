"""torch-kirigami 0.2.1: half of q/k, then of v, of all layers; then half of the MLP's hidden channels.

A plan is made for each of these, for all layers at once, from the weights that mhacut names; what is accepted
is applied. (Its automatic planner found no candidates in attention either, and takes minutes to say so.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from cell import RefusedError, short
from torch import Tensor, nn
from torch_kirigami import DependencyGraph
from torch_kirigami.pruning import Pruner, load_checkpoint, save_checkpoint

from mhacut.errors import UnsupportedModelError
from mhacut.plan import Plan, UnitPlan
from mhacut.surgery.find import find_prunable_layers
from tools import Done
from tools.mhacut_tool import masked


def cut(model: nn.Module, x: Tensor) -> Done:
    accepted: list[UnitPlan] = []
    refusals = []
    graph = None
    try:
        units = find_prunable_layers(model).units()
    except UnsupportedModelError:  # no names to ask with: whether it gets as far as that
        DependencyGraph.build(model, args=(x,))
        raise RefusedError("not asked: mhacut does not name its layers") from None
    for kind in ("qk", "v", "hidden"):
        plans = [
            UnitPlan(unit.layer, unit.kind, unit.width, (tuple(range(unit.width // 2)),) * unit.heads)
            for unit in units
            if unit.kind == kind and unit.width > 1
        ]
        if not plans:
            continue
        try:
            if graph is None:
                graph = DependencyGraph.build(model, args=(x,))
            pruner = Pruner(model, graph=graph)
            pruner.plan_remove(removed(graph, units, plans[:1]))  # a refusal of all takes a minute
            pruner.apply(pruner.plan_remove(removed(graph, units, plans)))
            graph = None
        except Exception as error:
            refusals.append(f"{kind}: {short(error)}")
            continue
        accepted += plans
    if not accepted:
        raise RefusedError("; ".join(refusals))
    plan = Plan(tuple(accepted))
    kinds = {unit.kind for unit in accepted}
    mode = "MLP" if kinds == {"hidden"} else "inner"
    return Done(model, mode, lambda dense: masked(dense, plan), "; ".join(refusals))


def removed(graph: Any, units: Sequence[Any], plans: Sequence[UnitPlan]) -> list[Any]:
    """The rows of the weights that make the channels which go."""
    by_key = {unit.key: unit for unit in units}
    selections = []
    for plan in plans:
        unit = by_key[plan.key]
        for axis in unit.axes:
            if axis == unit.output_projection or not axis.tensor.endswith("weight"):
                continue
            gone = axis.rows(unit.heads, unit.width)[:, plan.width :].flatten().tolist()
            tensor = graph.parameter(f"{unit.layer}.{axis.tensor}".lstrip("."))
            selections.append(tensor.axis(axis.dim).select(gone))
    return selections


def save(done: Done, folder: Path) -> None:
    save_checkpoint(done.model, folder / "slim.pt")


def load(architecture: str, folder: Path) -> nn.Module:
    model: nn.Module = load_checkpoint(timm.create_model(architecture), folder / "slim.pt")
    return model
