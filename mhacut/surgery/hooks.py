"""Listening to what flows through the taps of units while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mhacut.adapters.base import ActivationHook, Unit

Capture = Callable[[Unit, str, Tensor], None]


@contextmanager
def capturing(model: nn.Module, units: Iterable[Unit], listener: Capture) -> Iterator[None]:
    """In the block, every batch calls ``listener(unit, tap name, activation)`` for every tap of ``units``.

    Activations are detached, with channels moved last and split by head: [..., heads, width].
    """
    handles = []
    for unit in units:
        for name, hook in unit.hooks.items():
            whole = f"{unit.layer}.{hook.module}".rstrip(".")
            if "*" not in hook.module:
                submodule = model.get_submodule(whole)
                handles.append(_listen(submodule, hook, _taker(unit, name, hook, submodule, listener)))
                continue
            gathered = _Gathered(unit, name, listener)
            one_head = replace(unit, heads=1)
            for head in range(unit.heads):
                submodule = model.get_submodule(whole.replace("*", str(head)))
                take = _taker(one_head, name, hook, submodule, gathered.feed)
                handles.append(_listen(submodule, hook, take))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _listen(submodule: nn.Module, hook: ActivationHook, take: Callable[[Tensor], None]) -> RemovableHandle:
    if hook.side == "input":
        return submodule.register_forward_pre_hook(lambda module, args: take(args[hook.argument]))
    return submodule.register_forward_hook(lambda module, args, output: take(output))


class _Gathered:
    """One activation of all heads, of those of each by itself."""

    def __init__(self, unit: Unit, name: str, listener: Capture) -> None:
        """Tell ``listener`` once every head of ``unit`` was heard."""
        self.unit, self.name, self.listener = unit, name, listener
        self.heard: list[Tensor] = []

    def feed(self, unit: Unit, name: str, channels: Tensor) -> None:
        """Take the next head's, [..., 1, width]."""
        self.heard.append(channels)
        if len(self.heard) == self.unit.heads:
            together = torch.cat(self.heard, dim=-2)
            self.heard = []
            self.listener(self.unit, self.name, together)


def _taker(
    unit: Unit, name: str, hook: ActivationHook, submodule: nn.Module, listener: Capture
) -> Callable[[Tensor], None]:
    def take(activation: Tensor) -> None:
        if hook.then is not None:
            activation = hook.then(submodule, activation)
        channels = activation.detach().movedim(hook.channel_dim, -1)
        if channels.dim() == 2:  # of one token, which timm's class attention takes out by its number
            channels = channels[:, None]
        width = hook.width or unit.width
        stride = hook.stride or width
        channels = channels[..., hook.offset : hook.offset + (unit.heads - 1) * stride + width]
        listener(unit, name, channels.unfold(-1, width, stride))

    return take
