"""ToMe, "Token Merging: Your ViT But Faster" (arXiv 2210.09461), untrained: own reference.

The same number of tokens is merged in every block, one more in the first blocks where the budget asks for it.
Where Torch-Pruning cuts channels first, tokens make up for the rest of the budget.
"""

from __future__ import annotations

import copy
import dataclasses

from torch import nn

from methods.common import OutOfReachError, Slim, Task, bisect
from methods.merging import merge_tokens
from mhacut.surgery.flops import measure_flops


def prune(task: Task) -> Slim:
    base = Slim(task.dense, ("own",), {})
    if "channels" in task.options:
        from methods import torch_pruning_timm

        channels = task.options["channels"]
        base = torch_pruning_timm.prune(dataclasses.replace(task, share=channels["share"], options=channels))
    depth = len(base.model.blocks)
    flops: dict[int, int] = {}

    def merging(total: int) -> nn.Module:
        model = copy.deepcopy(base.model)
        merge_tokens(model, [total // depth + (index < total % depth) for index in range(depth)])
        return model

    def flops_at(total: int) -> int:
        if total not in flops:
            flops[total] = measure_flops(merging(total), task.input_size)
        return flops[total]

    most = depth * (base.model.patch_embed.num_patches // 2)
    if flops_at(most) > task.target:
        raise OutOfReachError(f"at least {100 * flops_at(most) / task.table.dense:.1f} % of the FLOPs stay")
    around = bisect(lambda share: flops_at(most - round(share * most)) > task.target)
    totals = [most - round(share * most) for share in around]
    best = min(totals, key=lambda total: abs(flops_at(total) - task.target))
    return Slim(merging(best), base.temperatures, {**base.checks, "tokens merged": best})
