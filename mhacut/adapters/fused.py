"""What most of timm's attention classes share: one ``qkv``, a softmax over q k^T, one ``proj``.

A class of that kind is a slim twin, made of :class:`FusedForward` and a line for each thing the class does
in its own way, and a :class:`FusedAdapter` that says how many tokens it handles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhacut.adapters.attend import attend
from mhacut.adapters.base import ActivationHook, Adapter, ChannelAxis, Layer, Unit
from mhacut.plan import UnitKind

NORMALISED = "q and k are normalised over the channels of a head"
NORM_BEHIND = "a norm before the projection runs over all v channels"


class FusedForward(nn.Module):
    """How a slim twin computes; widths follow from the sizes of ``qkv`` and ``proj``.

    Mixed into a timm class, before it, so that parameters keep timm's names. Never constructed: ``resize``
    gives a layer the twin's class.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        """[..., N, C] to [..., N, C_out]."""
        out: Tensor = self.finish(self.weigh(*self.heads_of(x)))
        return out

    def project(self: Any, x: Tensor) -> Tensor:
        """What ``qkv`` makes of [..., N, C]: [..., N, q | k | v]."""
        return fused_projection(self, x)

    def heads_of(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each [..., H, N, d], of tokens [..., N, C]."""
        qkv, v_dim = self.project(x), self.proj.weight.shape[1]
        qk_dim = (qkv.shape[-1] - v_dim) // 2
        q, k, v = (by_head(part, head_count(self)) for part in qkv.split((qk_dim, qk_dim, v_dim), dim=-1))
        return q, k, v

    def weigh(
        self: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None = None,
        *,
        scale: float | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """softmax(scale * q k^T + bias) v with the heads beside each other, [..., N, H * d_v].

        The scale is 1/sqrt(d) by default.
        """
        drop = getattr(self, "attn_drop", None)
        out = attend(
            q,
            k,
            v,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            fused=getattr(self, "fused_attn", False),
            attn_mask=bias,
            dropout_p=drop.p if drop is not None and self.training else 0.0,
            is_causal=is_causal,
        )
        return out.transpose(-3, -2).flatten(-2)

    def finish(self: Any, x: Tensor) -> Tensor:
        """The projection of [..., N, H * d_v], and dropout where the class has it."""
        projected: Tensor = self.proj(x)
        return self.proj_drop(projected) if hasattr(self, "proj_drop") else projected


def by_head(x: Tensor, heads: int) -> Tensor:
    """[..., N, H * d] as [..., H, N, d]."""
    return x.view(*x.shape[:-1], heads, -1).transpose(-3, -2)


def head_count(module: Any) -> int:
    """Heads of ``module``; Hiera has another name for them."""
    heads: int = module.heads if hasattr(module, "heads") else module.num_heads
    return heads


def fused_projection(module: Any, x: Tensor) -> Tensor:
    """``module.qkv`` of [..., C]; its bias may be in parts, of which that of k is a constant zero."""
    projected: Tensor
    if getattr(module, "q_bias", None) is None:
        projected = module.qkv(x)
        return projected
    bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
    return F.linear(x, module.qkv.weight, bias)


Part = Literal["q", "k", "v"]


@dataclass(frozen=True)
class Source:
    """Where q, k or v is made, head by head."""

    projection: str
    """Linear or convolution layer."""
    offset: int
    """Row of it that is channel 0 of head 0."""
    bias: ChannelAxis | None


@dataclass(frozen=True)
class Tokens:
    """What a layer handles of one input; of several windows, over all of them."""

    read: int
    """Tokens that q, k and v are made of."""
    written: int
    """Tokens that come out of the projection."""
    pairs: int
    """Pairs of a query and a key that see each other."""


class FusedAdapter(Adapter):
    """Rows of ``qkv`` are [q | k | v], each head-major; ``proj`` reads v head-major."""

    family = "attention"
    channel_dim = -1
    """Of the layer's output."""
    inner_channel_dim = -1
    """Of what flows out of ``qkv`` and into ``proj``."""

    def __init__(self, dense: type[nn.Module], slim: type[nn.Module]) -> None:
        """Serve ``dense``, a class of timm, whose layers become ``slim`` when they are cut."""
        self.module_classes = (dense, slim)
        self.slim = slim

    def tokens(self, module: Any, input_shape: tuple[int, ...]) -> Tokens:
        """Of an input [B, N, C]."""
        batch, tokens, _ = input_shape
        return Tokens(batch * tokens, batch * tokens, batch * tokens**2)

    def spread(self, module: Any, x: Tensor) -> Tensor:
        """What flows out of ``qkv`` as [windows, ..., channels]: keys of one window are centred together."""
        return x

    def heads(self, module: Any) -> int:
        """How many there are."""
        return head_count(module)

    def describe(self, name: str, module: Any) -> Layer:
        units: list[Unit] = []
        not_prunable: dict[UnitKind, str] = {}
        found: dict[UnitKind, Unit | str] = {"qk": self.qk(name, module), "v": self.v(name, module)}
        for kind, unit in found.items():
            if isinstance(unit, Unit):
                units.append(unit)
            else:
                not_prunable[kind] = unit
        return Layer(name, self, tuple(units), not_prunable, self.channel_dim)

    def qk(self, name: str, module: Any) -> Unit | str:
        """The unit, or why it is left whole."""
        if not (_is_identity(module, "q_norm") and _is_identity(module, "k_norm")):
            return NORMALISED
        heads, (width, _) = self.heads(module), self.widths(module)
        query, key = self.rows(module, "q"), self.rows(module, "k")
        return Unit(
            name,
            "qk",
            heads,
            width,
            axes=query + key,
            scale_axes=query,
            hooks={"query": self.hook(module, "q"), "key": self.hook(module, "k")},
            mixing="rotate",
            softmax_scaled=True,
        )

    def v(self, name: str, module: Any) -> Unit | str:
        """The unit, or why it is left whole."""
        if not _is_identity(module, "norm"):
            return NORM_BEHIND
        columns = self.columns(module)
        return Unit(
            name,
            "v",
            self.heads(module),
            self.widths(module)[1],
            axes=(*self.rows(module, "v"), columns),
            scale_axes=(columns,),
            hooks={"value": self.hook(module, "v"), "output": self.output_tap(module)},
            output_projection=columns,
            output_bias="proj.bias" if module.proj.bias is not None else None,
            mixing="rotate",
        )

    def source(self, module: Any, part: Part) -> Source:
        """Where ``part`` is made."""
        heads, (qk_width, _) = self.heads(module), self.widths(module)
        offset = {"q": 0, "k": heads * qk_width, "v": 2 * heads * qk_width}[part]
        if getattr(module, "q_bias", None) is not None:
            # The bias of k is a constant zero, of which resize makes another.
            return Source("qkv", offset, None if part == "k" else ChannelAxis(f"{part}_bias", 0))
        return Source(
            "qkv", offset, ChannelAxis("qkv.bias", 0, offset) if module.qkv.bias is not None else None
        )

    def rows(self, module: Any, part: Part) -> tuple[ChannelAxis, ...]:
        """Rows that make ``part``, and their bias."""
        source = self.source(module, part)
        weight = ChannelAxis(f"{source.projection}.weight", 0, source.offset)
        return (weight,) if source.bias is None else (weight, source.bias)

    def columns(self, module: Any) -> ChannelAxis:
        """Where ``proj`` reads the v channels."""
        return ChannelAxis("proj.weight", 1)

    def hook(self, module: Any, part: Part) -> ActivationHook:
        """``part`` as it is made."""
        source = self.source(module, part)
        if getattr(module, "q_bias", None) is not None:  # no module makes it: the layer does, of its input

            def project(layer: Any, x: Tensor) -> Tensor:
                return self.spread(layer, fused_projection(layer, x))

            return ActivationHook("", "input", source.offset, self.inner_channel_dim, then=project)
        spread = partial(self.spread, module)
        return ActivationHook(
            source.projection, "output", source.offset, self.inner_channel_dim, then=lambda _, x: spread(x)
        )

    def output_tap(self, module: Any) -> ActivationHook:
        """The v channels as ``proj`` reads them."""
        return ActivationHook("proj", "input", channel_dim=self.inner_channel_dim)

    def widths(self, module: Any) -> tuple[int, int]:
        """Rows of q, and of v, per head."""
        v_dim = int(module.proj.weight.shape[1])
        heads = self.heads(module)
        return (int(module.qkv.weight.shape[0]) - v_dim) // (2 * heads), v_dim // heads

    def flops(self, module: Any, input_shape: tuple[int, ...], widths: Mapping[UnitKind, Any]) -> Any:
        count = self.tokens(module, input_shape)
        dim = module.get_parameter(f"{self.source(module, 'v').projection}.weight").shape[1]
        heads, out = self.heads(module), module.proj.weight.shape[0]
        total: Any = 0
        if "qk" in widths:
            total += heads * widths["qk"] * (2 * dim * count.read + count.pairs)
        if "v" in widths:
            total += heads * widths["v"] * (dim * count.read + count.pairs + out * count.written)
        return total

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> nn.Module:
        if hasattr(module, "scale"):
            module.scale = self.widths(module)[0] ** -0.5
        if getattr(module, "q_bias", None) is not None:
            module.k_bias = module.k_bias.new_zeros(len(module.q_bias))
        module.__class__ = self.slim
        slim: nn.Module = module
        return slim


def _is_identity(module: nn.Module, name: str) -> bool:
    return type(getattr(module, name, None)) in (nn.Identity, type(None))
