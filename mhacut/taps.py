"""Listening to what flows through the taps of units while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

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
            submodule = model.get_submodule(f"{unit.layer}.{tap.module}".rstrip("."))
            handles.append(_listen(submodule, tap, _taker(unit, name, tap, submodule, listener)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _listen(submodule: nn.Module, tap: Tap, take: Callable[[Tensor], None]) -> RemovableHandle:
    if tap.side == "input":
        return submodule.register_forward_pre_hook(lambda module, args: take(args[tap.argument]))
    return submodule.register_forward_hook(lambda module, args, output: take(output))


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
