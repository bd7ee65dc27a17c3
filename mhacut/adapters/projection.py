"""Linear layers and convolutions as writers and readers of channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mhacut.adapters.base import ActivationHook, ChannelAxis, Unit
from mhacut.plan import UnitKind

_LINEAR = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Projection:
    """A linear layer or convolution, alone or in a module that holds a batch norm behind it.

    A transposed convolution can read channels, not write them.
    """

    name: str
    """Name of the whole module, relative to the layer."""
    linear_name: str
    linear: Any
    norm: str | None
    """Name of the batch norm."""

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Projection:
        """Return the projection of the layer ``module`` that is called ``name``."""
        whole = module.get_submodule(name)
        if isinstance(whole, (*_LINEAR, nn.ConvTranspose2d)):
            return cls(name, name, whole, None)
        (inner,) = (key for key, part in whole.named_children() if isinstance(part, _LINEAR))
        norms = [f"{name}.{key}" for key, part in whole.named_children() if isinstance(part, _BatchNorm)]
        assert len(norms) <= 1, name
        return cls(name, f"{name}.{inner}", whole.get_submodule(inner), norms[0] if norms else None)

    @property
    def channel_dim(self) -> int:
        """Dimension of input and output that holds channels."""
        return -1 if isinstance(self.linear, nn.Linear) else 1

    @property
    def reads(self) -> int:
        """Number of input channels."""
        return int(self.linear.in_features if isinstance(self.linear, nn.Linear) else self.linear.in_channels)

    @property
    def writes(self) -> int:
        """Number of output channels."""
        return int(self.linear.weight.shape[0])

    @property
    def bias(self) -> str | None:
        """Name of the bias."""
        return None if self.linear.bias is None else f"{self.linear_name}.bias"

    @property
    def transposed(self) -> bool:
        """Whether input channels lie along dimension 0 of the weight, and their effect varies by position."""
        return isinstance(self.linear, nn.ConvTranspose2d)

    def rows(self, offset: int = 0, stride: int | None = None) -> tuple[ChannelAxis, ...]:
        """Return the axes of channels written from row ``offset`` on: of the weight, and of the bias."""
        weight = ChannelAxis(f"{self.linear_name}.weight", 0, offset, head_step=stride, norm=self.norm)
        if self.bias is None:
            return (weight,)
        return weight, ChannelAxis(self.bias, 0, offset, head_step=stride)

    def scaled_rows(self, offset: int = 0, stride: int | None = None) -> tuple[ChannelAxis, ...]:
        """Return those of :meth:`rows` that a factor scales; a batch norm scales a bias before it."""
        axes = self.rows(offset, stride)
        return axes if self.norm is None else axes[:1]

    def columns(self) -> ChannelAxis:
        """Return the axis of channels that are read."""
        return ChannelAxis(f"{self.linear_name}.weight", 0 if self.transposed else 1)

    def hook(
        self,
        side: Literal["input", "output"],
        offset: int = 0,
        stride: int | None = None,
        width: int | None = None,
    ) -> ActivationHook:
        """Return the hook on what is read or, behind the batch norm, written."""
        name = self.linear_name if side == "input" else self.name
        return ActivationHook(name, side, offset, self.channel_dim, width, stride)

    def unit(
        self,
        layer: str,
        kind: UnitKind,
        size: tuple[int, int],
        written: tuple[ChannelAxis, ...],
        hooks: Mapping[str, ActivationHook],
        **further: Any,
    ) -> Unit:
        """Return the unit of channels that this projection reads.

        Args:
            layer: name of the layer.
            kind: ``v`` or ``hidden``.
            size: heads, and channels of each.
            written: all other axes of the channels.
            hooks: hooks of the unit, except for the one on what is read.
            further: fields of :class:`~mhacut.adapters.base.Unit`.
        """
        columns, read = self.columns(), "hidden" if kind == "hidden" else "output"
        fields = {
            "axes": (*written, columns),
            "scale_axes": (columns,),
            "hooks": {**hooks, read: self.hook("input")},
            "output_projection": columns,
            # A transposed convolution makes no constant of a constant: its bias cannot take one up.
            "output_bias": None if self.transposed else self.bias,
            "output_norm": self.norm,
        }
        return Unit(layer, kind, *size, **{**fields, **further})
