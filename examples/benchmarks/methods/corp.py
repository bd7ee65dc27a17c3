"""CORP, "closed-form one-shot representation-preserving" pruning (arXiv 2602.05243): own reference, one page.

From its description: the same share of q/k channels and of hidden channels stays in every layer; v is left
whole. The hidden channels with the most energy at fc2's output stay, and fc2 is refitted to stand in for the
others by an affine ridge regression on the calibration images. Of each head those q/k channels stay whose
rank-1 terms q_i k_i^T have the most energy in the attention logits, and the query's weights are refitted so
that Q_S M K_S^T comes nearest to Q K^T. The dense softmax temperature stays, being part of what is fitted.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from methods.common import Slim, Task, activations, attentions, cut_to, heads_of, uniform_widths

RIDGE = 1e-4
"""Relative to the mean diagonal of what is inverted."""


@torch.no_grad()
def prune(task: Task) -> Slim:
    widths = uniform_widths(task, ("qk", "hidden"))
    count, sums = 0, _Sums()
    for seen in activations(task):
        for name, found in seen.items():
            if name.endswith(".fc2"):
                rows = found.flatten(0, 1)
                sums.add(name, rows.T @ rows)
                sums.add(f"{name} mean", rows.sum(0))
            else:
                attention = task.dense.get_submodule(name.removesuffix(".qkv"))
                q, k, _ = heads_of(found, attention.num_heads)
                sums.add(f"{name} q", torch.einsum("bhti,bhtj->hij", q, q))
                sums.add(f"{name} k", torch.einsum("bhti,bhtj->hij", k, k))
        count += rows.shape[0]
    model = copy.deepcopy(task.dense)
    kept: dict[Any, Tensor] = {}
    for unit in task.prunable.units(("hidden",)):
        name = f"{unit.layer}.fc2"
        mean = sums.of[f"{name} mean"] / count
        second = sums.of[name] / count
        layer = model.get_submodule(name)
        energy = second.diagonal() * layer.weight.double().square().sum(0)
        stay, gone = _split(energy, widths[unit.key])
        centred = second - torch.outer(mean, mean)
        mixing = _solve(centred[stay][:, stay], centred[stay][:, gone])  # (kept, removed)
        effective_output_weights = layer.weight.double()
        layer.bias += (effective_output_weights[:, gone] @ (mean[gone] - mixing.T @ mean[stay])).float()
        layer.weight[:, stay] += (effective_output_weights[:, gone] @ mixing.T).float()
        kept[unit.key] = stay[None]
    for name, attention in attentions(model):
        key, heads, dim = (name, "qk"), attention.num_heads, attention.head_dim
        grams = sums.of[f"{name}.qkv q"], sums.of[f"{name}.qkv k"]
        stays = []
        for head in range(heads):
            query, keys = (gram[head] for gram in grams)
            stay, _ = _split(query.diagonal() * keys.diagonal(), widths[key])
            left = _solve(query[stay][:, stay], query[stay])  # (kept, dense)
            right = _solve(keys[stay][:, stay], keys[stay])
            mixing = left @ right.T  # M of Q_S M K_S^T, (kept, kept)
            rows = head * dim + stay
            for tensor in attention.qkv.parameters():  # without qkv_bias, the weight alone
                tensor[rows] = (mixing.T @ tensor[rows].double()).float()
            stays.append(stay)
        kept[key] = torch.stack(stays)
    slim = cut_to(model, task.prunable, kept, keep_temperature=True)
    return Slim(slim, ("own",), {"widths": sorted({f"{key[1]} {width}" for key, width in widths.items()})})


class _Sums:
    def __init__(self) -> None:
        self.of: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        self.of[name] = self.of[name] + value if name in self.of else value


def _split(score: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Channels of the largest scores and the others, ascending."""
    order = score.argsort(descending=True)
    return order[:width].sort().values, order[width:].sort().values


def _solve(gram: Tensor, target: Tensor) -> Tensor:
    """Ridge regression's (G + r)^-1 T."""
    ridge = RIDGE * gram.diagonal().mean()
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), target)
