"""Listening to what flows through the taps of units while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mhacut.adapters.base import Tap, Unit

Listener = Callable[[Unit, str, Tensor], None]


@contextmanager
def listening(model: nn.Module, units: Iterable[Unit], listener: Listener) -> Iterator[None]:
    """In the block, every batch calls ``listener(unit, tap name, activation)`` for every tap of ``units``.

    Activations are detached, with channels moved last and split by head: [..., heads, width].
    """
    handles = []
    for unit in units:
        for name, tap in unit.taps.items():
            whole = f"{unit.layer}.{tap.module}".rstrip(".")
            if "*" not in tap.module:
                submodule = model.get_submodule(whole)
                handles.append(_listen(submodule, tap, _taker(unit, name, tap, submodule, listener)))
                continue
            gathered = _Gathered(unit, name, listener)
            one_head = replace(unit, heads=1)
            for head in range(unit.heads):
                submodule = model.get_submodule(whole.replace("*", str(head)))
                take = _taker(one_head, name, tap, submodule, gathered.feed)
                handles.append(_listen(submodule, tap, take))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _listen(submodule: nn.Module, tap: Tap, take: Callable[[Tensor], None]) -> RemovableHandle:
    if tap.side == "input":
        return submodule.register_forward_pre_hook(lambda module, args: take(args[tap.argument]))
    return submodule.register_forward_hook(lambda module, args, output: take(output))


class _Gathered:
    """One activation of all heads, of those of each by itself."""

    def __init__(self, unit: Unit, name: str, listener: Listener) -> None:
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
    unit: Unit, name: str, tap: Tap, submodule: nn.Module, listener: Listener
) -> Callable[[Tensor], None]:
    def take(activation: Tensor) -> None:
        if tap.then is not None:
            activation = tap.then(submodule, activation)
        channels = activation.detach().movedim(tap.channel_dim, -1)
        if channels.dim() == 2:  # of one token, which timm's class attention takes out by its number
            channels = channels[:, None]
        width = tap.width or unit.width
        stride = tap.stride or width
        channels = channels[..., tap.offset : tap.offset + (unit.heads - 1) * stride + width]
        listener(unit, name, channels.unfold(-1, width, stride))

    return take
