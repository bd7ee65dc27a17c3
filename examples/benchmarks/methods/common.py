"""What the peers' methods share: the task, widths that meet a budget, and files of slim models.

FLOPs come from ``mhacut.surgery.flops`` for every method: one counter for all.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.layers import Attention
from torch import Tensor, nn

from methods.merging import merge_tokens, merged_of
from mhacut.plan import Plan, UnitKey, UnitPlan
from mhacut.surgery.costs import CostTable, build_cost_table
from mhacut.surgery.find import PrunableLayers, find_prunable_layers
from mhacut.surgery.slice import cut, exact_scale

NEAR = 0.005
"""Share of the budget that a model may miss it by."""
STEPS = 10_000
"""Steps in which a share of channels is searched."""
BATCH = 16

Temperature = Literal["own", "dense", "kept"]
"""What a slim model's logits are divided by: what the method fitted, or the root of the dense head's width
or of the kept one."""


class OutOfReachError(Exception):
    """A budget below what the method can cut a model down to."""


@dataclass(frozen=True)
class Task:
    """What a method is given."""

    dense: nn.Module
    """Eval mode; left as it is."""
    input_size: tuple[int, int, int]
    images: Tensor
    """[n, C, H, W], normalised."""
    labels: Tensor | None
    share: float
    """Of the dense model's FLOPs, in 0..1."""
    options: Mapping[str, Any]
    """Of the method."""
    prunable: PrunableLayers
    table: CostTable

    @classmethod
    def of(
        cls,
        dense: nn.Module,
        input_size: tuple[int, int, int],
        images: Tensor,
        labels: Tensor | None,
        share: float,
        options: Mapping[str, Any],
    ) -> Task:
        attentions(dense)
        prunable = find_prunable_layers(dense)
        table = build_cost_table(dense, prunable, input_size)
        return cls(dense, input_size, images, labels, share, options, prunable, table)

    @property
    def target(self) -> float:
        """FLOPs."""
        return self.share * self.table.dense

    def gap(self, widths: Mapping[UnitKey, int]) -> float:
        """How far the FLOPs at ``widths`` are from the target, as a share of it."""
        return abs(float(self.table.flops(widths)) / self.target - 1)


@dataclass(frozen=True)
class Slim:
    """What a method gives back."""

    model: nn.Module
    temperatures: tuple[Temperature, ...]
    """Those to try: ``own`` alone where the method fits its own."""
    checks: Mapping[str, Any]
    """What was found out on the way, for the table's notes."""


def attentions(model: nn.Module) -> list[tuple[str, Any]]:
    """Name and module of every timm attention.

    Raises:
        SystemExit: none, or a kind that these recipes do not know.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Attention)]
    if not found or any(
        module.gate is not None or type(module.q_norm) is not nn.Identity for _, module in found
    ):
        raise SystemExit(
            "the comparison needs a plain timm ViT: timm.layers.Attention without gate and q/k norm"
        )
    return found


# --- Widths ---


def bisect(too_much: Callable[[float], bool]) -> tuple[float, float]:
    """The largest share that is not too much and the smallest that is, in steps of 1/:data:`STEPS`."""
    low, high = 0, STEPS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if too_much(middle / STEPS) else (middle, high)
    return low / STEPS, high / STEPS


def uniform_widths(task: Task, kinds: Sequence[str]) -> dict[UnitKey, int]:
    """The same share of every unit of these kinds, so that FLOPs are the task's.

    Hidden channels, the smallest steps, make up for what the heads' whole channels leave.

    Raises:
        OutOfReachError: one channel each is still too much.
    """
    units = [unit for unit in task.prunable.units() if unit.kind in kinds]

    def widths(share: float, hidden: float | None = None) -> dict[UnitKey, int]:
        return {
            unit.key: max(round(unit.width * (hidden if hidden and unit.kind == "hidden" else share)), 1)
            for unit in units
        }

    def flops(found: Mapping[UnitKey, int]) -> float:
        return float(task.table.flops(found))

    check_reach(task, flops(widths(0.0)))
    shares = bisect(lambda share: flops(widths(share)) > task.target)
    found = [widths(share) for share in shares]
    for share in shares:
        hidden = bisect(lambda hidden, share=share: flops(widths(share, hidden)) > task.target)
        found += [widths(share, hidden_share) for hidden_share in hidden]
    return min(found, key=task.gap)


def check_reach(task: Task, lowest: float) -> None:
    if lowest > task.target * (1 + NEAR):
        raise OutOfReachError(f"at least {100 * lowest / task.table.dense:.1f} % of the FLOPs stay")


def cut_to(
    model: nn.Module, prunable: PrunableLayers, kept: Mapping[UnitKey, Tensor], *, keep_temperature: bool
) -> nn.Module:
    """``model`` cut to the channels ``kept`` ([heads, width], ascending) by unit.

    Args:
        model: of the dense shapes; left as it is.
        prunable: of it.
        kept: units not named stay whole.
        keep_temperature: fold what keeps the dense softmax temperature into the queries' weights; otherwise
            they stay as they are.
    """
    slim = copy.deepcopy(model)
    units = [prunable.unit(key) for key in kept]
    plan = Plan(
        tuple(
            UnitPlan(unit.layer, unit.kind, unit.width, tuple(map(tuple, kept[unit.key].tolist())))
            for unit in units
        )
    )
    channel_scales = {
        unit.key: torch.full(
            (unit.heads, unit.width), 1 / exact_scale(unit, kept[unit.key].shape[1])
        ).double()
        for unit in units
        if not keep_temperature
    }
    cut(slim, plan, channel_scales)
    return slim


# --- Activations ---


@torch.no_grad()
def activations(task: Task) -> Iterator[dict[str, Tensor]]:
    """Per batch of images, what flows where: ``<layer>.qkv`` out of qkv, ``<layer>.fc2`` into fc2.

    Each is [B, tokens, channels], float64.
    """
    seen: dict[str, Tensor] = {}
    handles = []
    for name, module in task.dense.named_modules():
        if name.endswith(".qkv"):
            handles.append(
                module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.double()}))
            )
        elif name.endswith(".fc2"):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, name=name: seen.update({name: args[0].double()})
                )
            )
    try:
        for batch in task.images.split(BATCH):
            task.dense(batch)
            yield dict(seen)
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()


def heads_of(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, [B, H, tokens, d] each, of [B, tokens, 3 * H * d]."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


# --- Files ---


def write_slim(file: str, slim: nn.Module, temperatures: Iterable[Temperature]) -> None:
    """Write weights, the temperatures to try and how many tokens each block merges."""
    state = {name: tensor.contiguous() for name, tensor in slim.state_dict().items()}
    about = {"temperatures": list(temperatures), "merged": merged_of(slim)}
    save_file(state, file, metadata={name: json.dumps(value) for name, value in about.items()})


def temperatures_of(file: str) -> tuple[Temperature, ...] | None:
    """The temperatures to try of a file that :func:`write_slim` wrote; None for other files."""
    metadata = _metadata(file)
    return tuple(json.loads(metadata["temperatures"])) if "temperatures" in metadata else None


def _metadata(file: str) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def read_slim(dense: nn.Module, file: str, temperature: Temperature) -> nn.Module:
    """The slim model of any method, in eval mode, out of its file.

    timm cannot load it, for its layers have the dense shapes: they are given the file's shapes by hand. The
    temperature is folded into the queries' weights, so fused and plain attention agree.

    Args:
        dense: a model of the dense shapes; left as it is.
        file: of :func:`write_slim`, or of ``mhacut prune``, which has its own loader.
        temperature: of the first kind of file.
    """
    if temperatures_of(file) is None:
        import mhacut

        return mhacut.load_model(file).eval()
    model = copy.deepcopy(dense).eval()
    state = load_file(file)
    before = {name: module.head_dim for name, module in attentions(model)}
    for name, tensor in state.items():
        owner, _, attribute = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        if isinstance(module, nn.Linear):
            setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
            module.out_features, module.in_features = module.weight.shape
    prunable = find_prunable_layers(model)
    for layer in prunable.layers:
        if layer.adapter.family != "attention":
            continue
        attention: Any = model.get_submodule(layer.name)
        v_width = attention.proj.in_features // attention.num_heads
        qk_width = (attention.qkv.out_features // attention.num_heads - v_width) // 2
        layer.adapter.resize(attention, {"qk": qk_width, "v": v_width})
        if temperature == "dense":
            rows = qk_width * attention.num_heads
            factor = (qk_width / before[layer.name]) ** 0.5
            state[f"{layer.name}.qkv.weight"][:rows] *= factor
            if f"{layer.name}.qkv.bias" in state:
                state[f"{layer.name}.qkv.bias"][:rows] *= factor
    model.load_state_dict(state, strict=True)
    merged = json.loads(_metadata(file).get("merged", "[]"))
    if merged:
        merge_tokens(model, merged)
    return model
