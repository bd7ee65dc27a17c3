"""Rows of linear layers as channel axes; what several adapters say in the same words."""

from __future__ import annotations

from torch import nn

from mhacut.adapters.base import ChannelAxis


def rows(module: nn.Module, linear: str, offset: int = 0) -> tuple[ChannelAxis, ...]:
    """The axes of channels that ``linear`` writes from row ``offset`` on, its bias included."""
    weight = ChannelAxis(f"{linear}.weight", 0, offset)
    if module.get_submodule(linear).bias is None:
        return (weight,)
    return weight, ChannelAxis(f"{linear}.bias", 0, offset)
