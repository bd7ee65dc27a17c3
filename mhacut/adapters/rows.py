"""Rows of linear layers as channel axes; what several adapters say in the same words."""

from __future__ import annotations

from torch import nn

from mhacut.adapters.base import ChannelAxis, Tap, Unit


def rows(module: nn.Module, linear: str, offset: int = 0) -> tuple[ChannelAxis, ...]:
    """The axes of channels that ``linear`` writes from row ``offset`` on, its bias included."""
    weight = ChannelAxis(f"{linear}.weight", 0, offset)
    if module.get_submodule(linear).bias is None:
        return (weight,)
    return weight, ChannelAxis(f"{linear}.bias", 0, offset)


def fused_qk(name: str, module: nn.Module, heads: int, width: int) -> Unit:
    """The q/k of softmax attention, in the rows [q | k | v] of one ``qkv``, each head-major.

    Args:
        name: of the layer.
        module: the layer; has ``qkv``.
        heads: of it.
        width: channels per head of q, and of k.
    """
    query, k_at = rows(module, "qkv"), heads * width
    return Unit(
        name,
        "qk",
        heads,
        width,
        axes=query + rows(module, "qkv", k_at),
        gain_axes=query,
        taps={"query": Tap("qkv", "output"), "key": Tap("qkv", "output", k_at)},
        rotatable=True,
        softmax_scaled=True,
    )
