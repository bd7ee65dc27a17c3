"""Torch-Pruning 1.6.1 on a plain timm ViT: any of its criteria, any way to spread the budget.

Its own scripts for timm do not run on timm 1.0.31: they replace ``forward`` by an older one. Without them
timm's attention keeps the attributes of the dense model, so they are set by hand. That leaves the softmax
temperature open: with the attribute ``scale`` as it was, timm takes 1/sqrt(dense width) without fused
attention and 1/sqrt(kept width) with it. Both are scored, and the better one is in the table.

``GroupHessianImportance.accumulate_grad`` looks tensors up by name in a table whose keys are the tensors, so
it keeps the last image's gradient instead of the sum over all. It is repaired here, in its favour.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.conv import _ConvNd

from methods.common import NEAR, STEPS, OutOfReachError, Slim, Task, attentions, bisect
from mhacut.plan import UnitKey

BATCH = 16
"""Images at a time in Taylor's backward passes, as in mhacut's search."""

Removed = list[tuple[str, bool, list[int]]]
"""Name of a linear layer, whether its outputs, and the channels that went."""


class SummedHessianImportance(torch_pruning.importance.GroupHessianImportance):
    """With squared gradients summed over all images, as it says of itself."""

    def accumulate_grad(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                squared = parameter.grad.detach().square()
                if parameter in self._accu_grad:
                    self._accu_grad[parameter] += squared
                    self._counter[parameter] += 1
                else:
                    self._accu_grad[parameter] = squared
                    self._counter[parameter] = 1


def prune(task: Task) -> Slim:
    criterion, spread = task.options["criterion"], task.options["spread"]
    model = copy.deepcopy(task.dense).eval().requires_grad_(True)
    for _, attention in attentions(model):
        attention.fused_attn = False
    importance = importance_of(criterion, model, task.images, task.labels)
    if spread == "uniform":
        ratios = uniform_ratios(task)
        pruner = build_pruner(model, task.images[:1], importance, *ratios, spread)
    else:
        pruner = build_pruner(model, task.images[:1], importance, 0.0, None, spread)
        ratio = global_ratio(task, pruner, model)
        ratios = (ratio, ratio)
        set_ratio(pruner, ratio)
    names = {module: name for name, module in model.named_modules()}
    removed: Removed = []
    for group in pruner.step(interactive=True):
        for dependency, channels in group:
            module = dependency.target.module
            if isinstance(module, nn.Linear):
                outputs = pruner.DG.is_out_channel_pruning_fn(dependency.handler)
                removed.append((names[module], outputs, list(channels)))
        group.prune()
    for _, attention in attentions(model):
        # timm reshapes by these, and Torch-Pruning does not know them. The scale stays as it was.
        attention.head_dim = attention.qkv.out_features // (3 * attention.num_heads)
        attention.attn_dim = attention.head_dim * attention.num_heads
    model.requires_grad_(False)
    checks = {
        "ratios": ratios,
        "widths": [attention.head_dim for _, attention in attentions(model)],
        "differs from masked dense model by": f"{difference(task, model, removed):.0e}",
        "fused and plain differ by": f"{path_difference(model, task.images[:64]):.0e}",
        "loads into timm": "no (other shapes)",
    }
    return Slim(model, ("dense", "kept"), checks)


def importance_of(criterion: str, model: nn.Module, images: Tensor, labels: Tensor | None) -> Any:
    """Torch-Pruning's scorer; gradients that it needs are in the model afterwards."""
    kinds = torch_pruning.importance
    if criterion in ("l1", "l2"):
        return kinds.GroupMagnitudeImportance(p=int(criterion[1]))
    if labels is None:
        raise SystemExit(f"Torch-Pruning's {criterion} needs labelled images: train/<class>/")
    if criterion == "taylor":
        for batch, truth in zip(images.split(BATCH), labels.split(BATCH), strict=True):
            cross_entropy(model(batch), truth).backward()
        return kinds.GroupTaylorImportance()
    importance = SummedHessianImportance()
    for image, truth in zip(images.split(1), labels.split(1), strict=True):
        model.zero_grad()
        cross_entropy(model(image), truth).backward()
        importance.accumulate_grad(model)
    return importance


def build_pruner(
    model: nn.Module, image: Tensor, importance: Any, ratio: float, hidden_ratio: float | None, spread: str
) -> Any:
    """A pruner that may take q, k, v and hidden channels and leaves the residual width."""
    heads = {attention.qkv: attention.num_heads for _, attention in attentions(model)}
    hidden = [module for name, module in model.named_modules() if name.endswith(".fc1")]
    roots = {*heads, *hidden}
    others = [m for m in model.modules() if isinstance(m, (nn.Linear, _ConvNd)) and m not in roots]
    return torch_pruning.pruner.BasePruner(
        model,
        image,
        importance=importance,
        global_pruning=spread != "uniform",
        isomorphic=spread == "isomorphic",
        pruning_ratio=ratio,
        pruning_ratio_dict=None if hidden_ratio is None else dict.fromkeys(hidden, hidden_ratio),
        num_heads=dict(heads),
        ignored_layers=others,
        # The defaults of these two are shared by all pruners of a process.
        in_channel_groups={},
        out_channel_groups={},
    )


def set_ratio(pruner: Any, ratio: float) -> None:
    pruner.current_step = 0
    pruner.per_step_pruning_ratio = pruner.iterative_pruning_ratio_scheduler(ratio, pruner.iterative_steps)


# --- Ratios that meet the budget ---


def kept(width: int, ratio: float) -> int:
    """How many channels Torch-Pruning 1.6.1 leaves of ``width`` where every layer loses the same share."""
    return int(width * (1 - ratio))


def uniform_ratios(task: Task) -> tuple[float, float]:
    """The pruning ratios of attention and MLP that bring FLOPs to the target.

    One ratio for both rarely meets it, because a channel of attention is too large a step. The MLP makes up
    for it, and attention keeps the more channels of the two ways there are: that did better.
    Widths depend on nothing but the ratios, so FLOPs are known without pruning.
    """
    units = task.prunable.units(("qk", "v", "hidden"))

    def widths(attention: float, mlp: float) -> dict[UnitKey, int]:
        ratios = {"qk": attention, "v": attention, "hidden": mlp}
        return {unit.key: max(kept(unit.width, ratios[unit.kind]), 1) for unit in units}

    def too_much(attention: float, mlp: float) -> bool:
        return float(task.table.flops(widths(attention, mlp))) > task.target

    def gap(pair: tuple[float, float]) -> float:
        return task.gap(widths(*pair))

    around = [1 - share for share in bisect(lambda share: too_much(1 - share, 1 - share))]
    pairs = [(ratio, ratio) for ratio in around]
    for attention in around:
        shares = bisect(lambda share, attention=attention: too_much(attention, 1 - share))
        pairs += [(attention, 1 - share) for share in shares]
    return min(pairs, key=lambda pair: (max(gap(pair) - NEAR, 0.0), round(pair[0], 4), gap(pair)))


def global_ratio(task: Task, pruner: Any, model: nn.Module) -> float:
    """The ratio at which a pruner that ranks layers together comes nearest to the target.

    Raises:
        OutOfReachError: it never comes down to it. (A layer that would lose all its channels is left whole.)
    """

    def widths(ratio: float) -> dict[UnitKey, int]:
        return widths_at(pruner, model, ratio)

    shares = bisect(lambda share: float(task.table.flops(widths(1 - share))) > task.target)
    best = min((1 - share for share in shares if 0 < share <= 1), key=lambda ratio: task.gap(widths(ratio)))
    if task.gap(widths(best)) <= NEAR:
        return best
    # The way down may jump, where a layer is left whole for having lost all: look on both sides.
    grid = [step / STEPS for step in range(100, STEPS, 50)]
    flops = {ratio: float(task.table.flops(widths(ratio))) for ratio in grid}
    nearest = min(flops, key=lambda ratio: abs(flops[ratio] / task.target - 1))
    if abs(flops[nearest] / task.target - 1) <= NEAR:
        return nearest
    below = [ratio for ratio in grid if flops[ratio] <= task.target]
    if not below:
        lowest = 100 * min(flops.values()) / task.table.dense
        raise OutOfReachError(f"at least {lowest:.1f} % of the FLOPs stay")
    return max(below, key=lambda ratio: flops[ratio])


def widths_at(pruner: Any, model: nn.Module, ratio: float) -> dict[UnitKey, int]:
    """What a pruner would leave at ``ratio``: nothing is pruned."""
    names = {module: name for name, module in model.named_modules()}
    set_ratio(pruner, ratio)
    widths: dict[UnitKey, int] = {}
    for group in pruner.step(interactive=True):
        for dependency, channels in group:
            module = dependency.target.module
            if not isinstance(module, nn.Linear) or pruner.DG.is_out_channel_pruning_fn(dependency.handler):
                continue
            layer, _, linear = names[module].rpartition(".")
            left = module.in_features - len(channels)
            if linear == "fc2":
                widths[layer, "hidden"] = left
            else:
                heads = model.get_submodule(layer).num_heads
                widths[layer, "qk"] = widths[layer, "v"] = left // heads
    return widths


# --- Checks ---


@torch.no_grad()
def difference(task: Task, slim: nn.Module, removed: Sequence[tuple[str, bool, Sequence[int]]]) -> float:
    """Largest difference of the logits to the dense model with the removed channels at zero, relative."""
    masked = copy.deepcopy(task.dense)
    for name, outputs, channels in removed:
        layer: Any = masked.get_submodule(name)
        if outputs:
            layer.weight[list(channels)] = 0
            if layer.bias is not None:
                layer.bias[list(channels)] = 0
        else:
            layer.weight[:, list(channels)] = 0
    expected = masked(task.images[:4])
    return float((slim(task.images[:4]) - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def path_difference(model: nn.Module, images: Tensor) -> float:
    """Largest difference of the logits with and without fused attention, relative."""
    logits = []
    for fused in (True, False):
        for _, attention in attentions(model):
            attention.fused_attn = fused
        logits.append(model(images))
    return float((logits[0] - logits[1]).abs().max() / logits[1].abs().max())
