"""Rows of linear layers as channel axes; what several adapters say in the same words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mhacut.adapters.base import ActivationHook, ChannelAxis, Unit


@dataclass(frozen=True)
class Projection:
    """A linear layer or convolution, alone or in a module that holds a batch norm behind it.

    A transposed convolution can read channels, not write them.
    """

    name: str
    """Of the whole, relative to the layer."""
    linear_name: str
    linear: Any
    norm: str | None
    """Name of the batch norm."""

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Projection:
        """The one in ``module`` called ``name``."""
        whole = module.get_submodule(name)
        if isinstance(whole, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            return cls(name, name, whole, None)
        inner = [(key, part) for key, part in whole.named_children() if isinstance(part, _LINEAR)]
        norms = [f"{name}.{key}" for key, part in whole.named_children() if isinstance(part, _BatchNorm)]
        assert len(inner) == 1, name
        assert len(norms) <= 1, name
        return cls(name, f"{name}.{inner[0][0]}", inner[0][1], norms[0] if norms else None)

    @property
    def channel_dim(self) -> int:
        """Of what it reads and writes."""
        return -1 if isinstance(self.linear, nn.Linear) else 1

    @property
    def reads(self) -> int:
        """Channels of its input."""
        return int(self.linear.in_features if isinstance(self.linear, nn.Linear) else self.linear.in_channels)

    @property
    def writes(self) -> int:
        """Channels of its output."""
        return int(self.linear.weight.shape[0])

    @property
    def bias(self) -> str | None:
        """Name of its bias."""
        return None if self.linear.bias is None else f"{self.linear_name}.bias"

    @property
    def transposed(self) -> bool:
        """Whether what it makes of one channel lies elsewhere in its weight, and is not alike everywhere."""
        return isinstance(self.linear, nn.ConvTranspose2d)

    @property
    def constant_bias(self) -> str | None:
        """Its bias, if that can take up what it makes of constant channels."""
        return None if self.transposed else self.bias

    def rows(self, offset: int = 0, stride: int | None = None) -> tuple[ChannelAxis, ...]:
        """The axes of channels that it writes from row ``offset`` on."""
        weight = ChannelAxis(f"{self.linear_name}.weight", 0, offset, head_step=stride, norm=self.norm)
        if self.bias is None:
            return (weight,)
        return weight, ChannelAxis(self.bias, 0, offset, head_step=stride)

    def scaled_rows(self, offset: int = 0, stride: int | None = None) -> tuple[ChannelAxis, ...]:
        """Of :meth:`rows` those that a factor scales; a batch norm's own does so for a bias before it."""
        axes = self.rows(offset, stride)
        return axes if self.norm is None else axes[:1]

    def columns(self) -> ChannelAxis:
        """The axis of channels that it reads."""
        return ChannelAxis(f"{self.linear_name}.weight", 0 if self.transposed else 1)

    def hook(
        self,
        side: Literal["input", "output"],
        offset: int = 0,
        stride: int | None = None,
        width: int | None = None,
    ) -> ActivationHook:
        """What it reads or, behind the batch norm, writes."""
        name = self.linear_name if side == "input" else self.name
        return ActivationHook(name, side, offset, self.channel_dim, width, stride)


_LINEAR = (nn.Linear, nn.Conv2d)


def rows(module: nn.Module, linear: str, offset: int = 0) -> tuple[ChannelAxis, ...]:
    """The axes of channels that ``linear`` writes from row ``offset`` on, its bias included."""
    return Projection.of(module, linear).rows(offset)


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
        scale_axes=query,
        hooks={"query": ActivationHook("qkv", "output"), "key": ActivationHook("qkv", "output", k_at)},
        mixing="rotate",
        softmax_scaled=True,
    )
