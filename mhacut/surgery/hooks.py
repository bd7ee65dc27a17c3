"""Forward hooks that capture activations, and recorded layer calls to repeat at other widths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.hooks import RemovableHandle

from mhacut.adapters.base import ActivationHook, Layer, Unit
from mhacut.plan import UnitKind
from mhacut.surgery.slice import slice_layer

Capture = Callable[[Unit, str, Tensor], None]
"""Function that receives a :class:`Unit`, the name of 1 of its hooks, and the activation [..., heads,
width]."""


@contextmanager
def captured_outputs(
    model: nn.Module, names: Iterable[str], take: Callable[[Any, Any], Any] = lambda args, output: output
) -> Iterator[Mapping[str, list[Any]]]:
    """Collect ``take(args, output)`` of each call of the modules ``names`` in a ``with`` statement."""
    captured: dict[str, list[Any]] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        captured.setdefault(name, []).append(take(args, output))

    with registered(model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names):
        yield captured


@contextmanager
def registered(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks ``handles`` at the end of a ``with`` block, or if registering a hook fails."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@contextmanager
def capturing(model: nn.Module, units: Iterable[Unit], capture: Capture) -> Iterator[None]:
    """In a ``with`` statement, pass the channel activations of ``units`` to ``capture`` at every forward."""
    with registered(handle for unit in units for handle in _hooks_of(model, unit, capture)):
        yield


def _hooks_of(model: nn.Module, unit: Unit, capture: Capture) -> Iterator[RemovableHandle]:
    for name, hook in unit.hooks.items():
        path = f"{unit.layer}.{hook.module}".rstrip(".")
        if "*" not in hook.module:
            yield _register(model.get_submodule(path), unit, name, hook, capture)
            continue
        one_head, join = replace(unit, heads=1), _JoinHeads(unit, name, capture)
        for head in range(unit.heads):
            yield _register(model.get_submodule(path.replace("*", str(head))), one_head, name, hook, join)


class _JoinHeads:
    """Capture function that joins the activations of heads that run one after the other."""

    def __init__(self, unit: Unit, name: str, capture: Capture) -> None:
        self._unit, self._name, self._capture = unit, name, capture
        self._heads: list[Tensor] = []

    def __call__(self, unit: Unit, name: str, channels: Tensor) -> None:
        self._heads.append(channels)  # (..., 1, width)
        if len(self._heads) == self._unit.heads:
            joined = torch.cat(self._heads, dim=-2)  # (..., H, width)
            self._heads = []
            self._capture(self._unit, self._name, joined)


def _register(
    submodule: nn.Module, unit: Unit, name: str, hook: ActivationHook, capture: Capture
) -> RemovableHandle:
    def take(activation: Tensor) -> None:
        capture(unit, name, _by_head(unit, hook, submodule, activation))

    if hook.side == "input":
        return submodule.register_forward_pre_hook(lambda module, args: take(args[hook.argument]))
    return submodule.register_forward_hook(lambda module, args, output: take(output))


def _by_head(unit: Unit, hook: ActivationHook, submodule: nn.Module, activation: Tensor) -> Tensor:
    if hook.then is not None:
        activation = hook.then(submodule, activation)
    channels = activation.detach().movedim(hook.channel_dim, -1)  # (..., C)
    if channels.dim() == 2:  # timm's class attention selects its token by index, without a token dimension
        channels = channels[:, None]
    width = hook.width or unit.width
    stride = hook.stride or width
    channels = channels[..., hook.offset : hook.offset + (unit.heads - 1) * stride + width]
    return channels.unfold(-1, width, stride)  # (..., H, width)


@dataclass(frozen=True)
class TensorShape:
    shape: tuple[int, ...]
    dtype: torch.dtype


LayerInputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a layer call, with a :class:`TensorShape` in place of each tensor."""


@contextmanager
def recorded_calls(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[LayerInputs]]]:
    calls: dict[str, list[LayerInputs]] = {name: [] for name in names}
    with registered(
        model.get_submodule(name).register_forward_pre_hook(_recorder(recorded), with_kwargs=True)
        for name, recorded in calls.items()
    ):
        yield calls


def _recorder(calls: list[LayerInputs]) -> Callable[[nn.Module, Any, Any], None]:
    # A function, because deepcopy keeps functions. A partial would be copied, and its list with it.
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(tree_map(_shape_only, (args, kwargs)))

    return hook


def _shape_only(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.dim() == 0 and not leaf.is_floating_point():  # sizes are tensors while torch traces
        return int(leaf)
    return TensorShape(tuple(int(size) for size in leaf.shape), leaf.dtype)


class Replay(nn.Module):
    """Module that repeats a recorded call of a layer, with the tensors of the call as inputs."""

    def __init__(self, module: nn.Module, call: LayerInputs) -> None:
        super().__init__()
        self.module = module
        self._leaves, self._structure = tree_flatten(call)

    def zeros(self, device: torch.device) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(leaf.shape, dtype=leaf.dtype, device=device) for leaf in self._shapes())

    def noise(self, device: torch.device) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        return tuple(
            torch.randn(leaf.shape, generator=generator).to(device, leaf.dtype)
            if leaf.dtype.is_floating_point
            else torch.zeros(leaf.shape, dtype=leaf.dtype, device=device)
            for leaf in self._shapes()
        )

    def _shapes(self) -> list[TensorShape]:
        return [leaf for leaf in self._leaves if isinstance(leaf, TensorShape)]

    def forward(self, *tensors: Tensor) -> Any:
        inputs = iter(tensors)
        leaves = [next(inputs) if isinstance(leaf, TensorShape) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._structure)
        return self.module(*args, **kwargs)


def cost_key(module: nn.Module) -> tuple[Any, ...]:
    """Return a key that is equal for modules with equal cost (classes, shapes, functions, switches)."""
    # Floats (dropout probabilities, scales) do not change the cost.
    parts: list[Any] = []
    for name, part in module.named_modules():
        attributes = vars(part).items()
        switches = [
            (key, value if isinstance(value, FunctionType) else repr(value))
            for key, value in attributes
            if isinstance(value, int | str | tuple | list | FunctionType)
        ]
        tensors = (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        shapes = [(key, tuple(tensor.shape)) for key, tensor in tensors]
        parts.append((name, type(part), *switches, *shapes))
    return tuple(parts)


def cut_to_widths(module: nn.Module, layer: Layer, widths: Mapping[UnitKind, int]) -> nn.Module:
    """Return a copy of a layer with the first ``widths[kind]`` channels of each head."""
    plans = {unit.kind: unit.keep_first(widths[unit.kind]) for unit in layer.units}
    slim = copy.deepcopy(module)
    slice_layer(slim, layer, plans)
    return slim
