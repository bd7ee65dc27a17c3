"""Attention and MLPs of any class, recognised by their linear layers and proved on random tokens.

A form is accepted only if mhacut computes the outputs of the module in float64, with random weights. A module
that matches no form stays as it is.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from mhacut.adapters.attend import attend
from mhacut.adapters.base import Adapter
from mhacut.adapters.mlp import Mlp
from mhacut.adapters.softmax import Hook, Softmax, Twin
from mhacut.errors import UnsupportedModelError

_TOLERANCE = 1e-6
"""Relative difference of outputs. Some classes compute the softmax in float32."""
_GRIDS = ((8, 8), (8, 16))
"""Heights and widths of the token maps in a proof."""
_PROVED: dict[tuple[Any, ...], Adapter | None] = {}
"""Adapters by structure: a copy on the meta device has no values for a proof of its own."""


class _NamedTwin(Twin):
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        tokens = args or (options.pop(self.spec.tokens_name),)
        return super().forward(*tokens, **options)


def _with_mask(m: Any, q: Tensor, k: Tensor, x: Tensor, *args: Any) -> tuple[Any, ...]:
    mask = None
    for (name, default), value in zip(m.spec.arguments, args, strict=True):
        if value is None or value is default or value is False:
            continue
        if name != m.spec.mask_name:
            raise UnsupportedModelError(f"a cut {m.spec.cls.__name__} takes no argument {name!r}")
        mask = value
    return q, k, mask


def _attended(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    dropout = m.attn_drop.p if m.training and hasattr(m, "attn_drop") else 0.0
    return attend(q, k, v, scale=q.shape[-1] ** -0.5, fused=True, attn_mask=mask, dropout_p=dropout)


def _projected(m: Any, y: Tensor, *_: Any) -> Any:
    y = m.get_submodule(m.spec.read_by)(y)
    y = m.proj_drop(y) if hasattr(m, "proj_drop") else y
    return y if m.spec.beside is None else (y, *[None] * m.spec.beside)


@dataclass(eq=False)
class PlainAttention(Softmax):
    """Global softmax attention of a class without a row of its own."""

    heads_at: str = "num_heads"
    """Attribute with the number of heads, which may be that of a submodule."""
    beside: int | None = None
    """Number of ``None`` that follow the output in a tuple; ``None`` if the output is a tensor."""
    logits: Hook = _with_mask
    weigh: Hook = _attended
    finish: Hook = _projected
    mixins: tuple[type, ...] = (_NamedTwin,)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tokens_name = list(inspect.signature(self.cls.forward).parameters)[1]
        self.mask_name = next((name for name, _ in self.arguments if "mask" in name), None)
        self.result = str(self.read_by)

    def heads(self, module: Any) -> int:
        return int(attrgetter(self.heads_at)(module))


def adapter_by_structure(module: nn.Module) -> Adapter | None:
    """Return the adapter of a module whose linear layers have a known form; None without a proof."""
    spec = getattr(module, "spec", None)
    if isinstance(spec, PlainAttention):  # a cut layer
        return spec
    linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    if "" in linears or not 2 <= len(linears) <= 4:
        return None
    key = _structure_of(module)
    if key not in _PROVED:
        if next(module.parameters()).is_meta:
            return None
        _PROVED[key] = _prove(module, linears)
    return _PROVED[key]


def _prove(module: nn.Module, linears: Mapping[str, Any]) -> Adapter | None:
    trial = _with_random_weights(module)
    width = next(iter(linears.values())).in_features
    outputs = {grid: _run(trial, grid, width) for grid in _GRIDS}
    if None in outputs.values():
        return None
    first, *beside = outputs[_GRIDS[0]]
    if first.dim() == 3 and all(other is None for other in beside):
        is_tuple = isinstance(trial(*_inputs(trial, _GRIDS[0], width)), tuple)
        for form in _attention_forms(module, linears):
            spec = PlainAttention(type(module), beside=len(beside) if is_tuple else None, **form)
            if _reproduces(spec, trial, width):
                return spec
    for mlp in _mlp_forms(type(module), module, linears):
        if _hidden_channels_are_separate(mlp, trial, width):
            return mlp
    return None


def _attention_forms(module: nn.Module, linears: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Fields of :class:`PlainAttention` to try, the likely ones first."""
    heads = list(_head_counts(module))
    for reader in reversed(linears):
        width = linears[reader].in_features
        writers = [name for name in linears if name != reader]
        shapes = [linears[name].weight.shape for name in writers]
        if len(writers) == 1 and shapes[0][0] == 3 * width:
            forms = [({writers[0]: "qkv"}, per_head) for per_head in (False, True)]
        elif len(writers) == 3 and set(shapes) == {(width, shapes[0][1])}:
            # Names order the tries: q_proj, to_q, wq, query, ...
            named = sorted(writers, key=lambda name: _letter(name, writers))
            forms = [(dict(zip(order, "qkv", strict=True)), False) for order in permutations(named)]
        else:
            continue
        for at in heads:
            if width % attrgetter(at)(module) == 0:
                for written_by, per_head in forms:
                    yield {
                        "written_by": written_by,
                        "per_head": per_head,
                        "read_by": reader,
                        "heads_at": at,
                    }


def _letter(name: str, others: list[str]) -> int:
    last = name.rpartition(".")[2].removeprefix("to_").removeprefix("w").removeprefix("lin_")
    return "qkv".find(last[:1]) if last[:1] in "qkv" else len(others)


def _head_counts(module: nn.Module) -> Iterator[str]:
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            counts = attribute in ("heads", "nhead", "n_head") or ("num" in attribute and "head" in attribute)
            if counts and type(value) is int and value > 0:
                yield f"{name}.{attribute}".lstrip(".")


def _mlp_forms(cls: type[nn.Module], module: nn.Module, linears: Mapping[str, Any]) -> Iterator[Mlp]:
    depthwise = tuple(
        name
        for name, part in module.named_children()
        if any(isinstance(p, nn.Conv2d) for p in part.modules())
    )
    for reader in reversed(linears):
        writers = tuple(name for name in linears if name != reader)
        rows = {linears[name].out_features for name in writers}
        inputs = {linears[name].in_features for name in writers}
        hidden = linears[reader].in_features
        # Tokens keep their width. Squeezing gates of channels and tables of positions do not.
        if inputs != {linears[reader].out_features} or len(writers) > 2:
            continue
        if rows == {hidden}:
            yield Mlp(cls, writers, reader, between=depthwise)
        elif rows == {2 * hidden} and len(writers) == 1:
            yield Mlp(cls, writers, reader, between=depthwise, halves=True)


@torch.no_grad()
def _reproduces(spec: PlainAttention, trial: nn.Module, width: int) -> bool:
    """Whether the forward pass of a cut layer gives the outputs of the module, also with a mask."""
    # Other dropouts than these two would be lost in training.
    dropouts = {name for name, part in trial.named_modules() if isinstance(part, nn.Dropout) and part.p}
    if not dropouts <= {"attn_drop", "proj_drop"}:
        return False
    twin = copy.deepcopy(trial)
    spec.resize(twin, {})
    for height, length in _GRIDS:
        tokens = height * length
        masks: list[dict[str, Tensor]] = [{}]
        if spec.mask_name is not None:
            masks.append({spec.mask_name: torch.randn(2, 1, tokens, tokens, dtype=torch.float64)})
        for mask in masks:
            expected = _run(trial, (height, length), width, **mask)
            actual = _run(twin, (height, length), width, **mask)
            if expected is None and mask:  # the class takes masks of another form
                continue
            if not _equal(actual, expected):
                return False
    return True


@torch.no_grad()
def _hidden_channels_are_separate(mlp: Mlp, trial: nn.Module, width: int) -> bool:
    """Whether half of the hidden channels compute what all do without the columns of the others."""
    units = mlp.describe("", trial).units
    if not units:
        return False
    (unit,) = units
    kept = torch.arange(unit.width) % 2 == 0
    masked, slim = copy.deepcopy(trial), copy.deepcopy(trial)
    masked.get_parameter(unit.scale_axes[0].tensor)[:, ~kept] = 0
    rows: dict[tuple[str, int], list[Tensor]] = {}
    for axis in unit.axes:
        rows.setdefault((axis.tensor, axis.dim), []).append(axis.rows(1, unit.width).flatten()[kept])
    for (name, dim), parts in rows.items():
        owner = slim.get_submodule(name.rpartition(".")[0])
        tensor = getattr(owner, name.rpartition(".")[2])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(tensor.index_select(dim, torch.cat(parts))))
        if isinstance(owner, nn.Conv2d):
            owner.groups = int(kept.sum())
    return all(_equal(_run(slim, grid, width), _run(masked, grid, width)) for grid in _GRIDS)


def _equal(actual: list[Any] | None, expected: list[Any] | None) -> bool:
    if actual is None or expected is None or actual[0].shape != expected[0].shape:
        return False
    difference = (actual[0] - expected[0]).abs().max()
    return bool(difference <= _TOLERANCE * expected[0].abs().max().clamp_min(1e-9))


@torch.no_grad()
def _run(module: nn.Module, grid: tuple[int, int], width: int, **more: Any) -> list[Any] | None:
    """Run a module on random tokens; return its outputs, or None if the module takes other arguments."""
    try:
        output = module(*_inputs(module, grid, width), **more)
    except Exception:  # of any kind: the module is code that nobody here knows
        return None
    outputs = list(output) if isinstance(output, tuple) else [output]
    return outputs if isinstance(outputs[0], Tensor) else None


def _inputs(module: nn.Module, grid: tuple[int, int], width: int) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    inputs: list[Any] = [torch.randn(2, grid[0] * grid[1], width, generator=generator, dtype=torch.float64)]
    for parameter in list(inspect.signature(module.forward).parameters.values())[1:]:
        if parameter.default is not parameter.empty or parameter.kind.name.startswith("VAR"):
            break
        sizes = {"h": grid[0], "height": grid[0], "w": grid[1], "width": grid[1]}
        inputs.append(sizes.get(parameter.name.lower()))
    return inputs


def _with_random_weights(module: nn.Module) -> nn.Module:
    """Copy in float64 whose weights are random, because zeros would hide what a parameter does."""
    trial = copy.deepcopy(module).cpu().double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in trial.parameters():
        scale = max(parameter[0].numel(), 1) ** -0.5 if parameter.dim() > 1 else 0.5
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return trial


def _structure_of(module: nn.Module) -> tuple[Any, ...]:
    parts: list[Any] = []
    for name, part in module.named_modules():
        values = [
            (key, repr(value)) for key, value in vars(part).items() if isinstance(value, int | float | str)
        ]
        tensors = (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        parts.append((name, type(part), *values, *((key, tuple(tensor.shape)) for key, tensor in tensors)))
    return tuple(parts)
