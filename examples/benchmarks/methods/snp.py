"""SNP, "Structured Neuron-level Pruning to Preserve Attention Scores" (arXiv 2404.11630): own reference.

Its criterion only, from its description, for the official code scores channels on a closed service: q/k
channels go together, those first that say least of the attention scores; v channels go that repeat those of
other heads. Here that means

- q/k: the scalar product of the rank-1 term q_i k_i^T with the logits Q K^T of its head, mean over images;
- v: one minus the largest |cosine| with any channel of another head;
- hidden: the energy that a channel brings to fc2's output. How the paper scores the MLP was not read.

The same share of channels stays everywhere; nothing is refitted, for the paper trains afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from methods.common import Slim, Task, activations, cut_to, heads_of, uniform_widths


@torch.no_grad()
def prune(task: Task) -> Slim:
    widths = uniform_widths(task, ("qk", "v", "hidden"))
    sums: dict[Any, Tensor] = {}

    def add(key: Any, value: Tensor) -> None:
        sums[key] = sums[key] + value if key in sums else value

    for seen in activations(task):
        for name, found in seen.items():
            layer = name.rpartition(".")[0]
            if name.endswith(".fc2"):
                energy = found.square().sum((0, 1))
                add(
                    (layer, "hidden"), energy * task.dense.get_submodule(name).weight.double().square().sum(0)
                )
                continue
            q, k, v = heads_of(found, task.dense.get_submodule(layer).num_heads)
            # <q_i k_i^T, Q K^T> = sum_j (q_i . q_j) (k_i . k_j), per image
            queries, keys = (torch.einsum("bhti,bhtj->bhij", x, x) for x in (q, k))
            add((layer, "qk"), (queries * keys).sum((0, 3)))
            rows = v.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)  # (H * d, B * tokens)
            add((layer, "v"), rows @ rows.T)
    kept = {}
    for unit in task.prunable.units():
        score = sums[unit.key]
        if unit.kind == "v":
            norms = score.diagonal().sqrt()
            cosine = (score / norms / norms[:, None]).abs()
            head = torch.arange(unit.heads).repeat_interleave(unit.width)
            cosine[head[:, None] == head] = 0
            score = 1 - cosine.amax(1)
        order = score.view(unit.heads, unit.width).argsort(1, descending=True)
        kept[unit.key] = order[:, : widths[unit.key]].sort(1).values
    slim = cut_to(task.dense, task.prunable, kept, keep_temperature=False)
    return Slim(
        slim,
        ("kept", "dense"),
        {"widths": sorted({f"{key[1]} {width}" for key, width in widths.items()})},
    )
