"""VBP, "Variance-Based Pruning" (arXiv 2507.12988), from its description: own reference, one page.

Hidden channels of the MLPs whose activation varies least are removed, all layers ranked together, and their
mean is added to what fc2 adds (mean shift). Attention stays whole, so most of the FLOPs of small models
are out of its reach.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from methods.common import Slim, Task, activations, bisect, check_reach, cut_to
from mhacut.plan import UnitKey


def prune(task: Task) -> Slim:
    count = 0
    total: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    for seen in activations(task):
        for name, hidden in seen.items():
            if name.endswith(".fc2"):
                rows = hidden.flatten(0, 1)
                total[name] = total.get(name, 0) + rows.sum(0)
                squares[name] = squares.get(name, 0) + rows.square().sum(0)
        count += rows.shape[0]
    units = task.prunable.units(("hidden",))
    mean = {unit.key: total[f"{unit.layer}.fc2"] / count for unit in units}
    variance = {unit.key: squares[f"{unit.layer}.fc2"] / count - mean[unit.key].square() for unit in units}
    ranked = torch.cat(list(variance.values())).sort(descending=True).values

    def chosen(share: float) -> dict[UnitKey, Tensor]:
        """Per unit, [1, width]; its most varying channel at least."""
        least = ranked[max(round(share * len(ranked)), 1) - 1]
        return {
            key: ((values >= least) | (values == values.max())).nonzero().view(1, -1)
            for key, values in variance.items()
        }

    def widths(share: float) -> dict[UnitKey, int]:
        return {key: channels.shape[1] for key, channels in chosen(share).items()}

    check_reach(task, float(task.table.flops(widths(0.0))))
    shares = bisect(lambda share: float(task.table.flops(widths(share))) > task.target)
    kept = chosen(min(shares, key=lambda share: task.gap(widths(share))))
    model = copy.deepcopy(task.dense)
    for unit in units:
        gone = torch.ones(unit.width, dtype=torch.bool)
        gone[kept[unit.key]] = False
        output_projection = model.get_submodule(f"{unit.layer}.fc2")
        with torch.no_grad():
            shift = output_projection.weight[:, gone].double() @ mean[unit.key][gone]
            output_projection.bias += shift.to(output_projection.bias.dtype)
    slim = cut_to(model, task.prunable, kept, keep_temperature=True)
    return Slim(slim, ("own",), {"hidden widths": [kept[unit.key].shape[1] for unit in units]})
