"""Capture activations of units and outputs of modules while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mhacut.adapters.base import ActivationHook, Unit

Capture = Callable[[Unit, str, Tensor], None]
"""Called with a unit, the name of one of its hooks, and the activation, [..., heads, width]."""


@contextmanager
def captured_outputs(
    model: nn.Module, names: Iterable[str], take: Callable[[Any, Any], Any] = lambda args, output: output
) -> Iterator[Mapping[str, list[Any]]]:
    """Capture the outputs of the named modules while ``model`` runs in the block.

    Args:
        model: which has the modules.
        names: of the modules; "" is the model itself.
        take: (arguments by position, output) -> what to keep of a call.

    Yields:
        What was kept of each call by name, names in the order of their first calls.
    """
    found: dict[str, list[Any]] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        found.setdefault(name, []).append(take(args, output))

    with registered(model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names):
        yield found


@contextmanager
def registered(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks when the block ends, or if one of them cannot be registered."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@contextmanager
def capturing(model: nn.Module, units: Iterable[Unit], capture: Capture) -> Iterator[None]:
    """Call ``capture`` for every hook of ``units`` whenever ``model`` runs in the block.

    Activations are detached, with channels moved last and split by head.
    """
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
    """Capture of an activation whose heads are computed one after the other; passes all heads on at once."""

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
    """The unit's channels in ``activation``, [..., heads, width]."""
    if hook.then is not None:
        activation = hook.then(submodule, activation)
    channels = activation.detach().movedim(hook.channel_dim, -1)  # (..., C)
    if channels.dim() == 2:  # of one token, which timm's class attention takes out by its number
        channels = channels[:, None]
    width = hook.width or unit.width
    stride = hook.stride or width
    channels = channels[..., hook.offset : hook.offset + (unit.heads - 1) * stride + width]
    return channels.unfold(-1, width, stride)  # (..., H, width)
