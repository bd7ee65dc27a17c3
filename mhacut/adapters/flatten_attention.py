"""Adapters of the attention classes of FLatten Transformers (:mod:`mhacut.flatten`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mhacut.adapters.attend import attend_as
from mhacut.adapters.base import ActivationHook, Adapter, ChannelAxis, Layer, Projection, Unit
from mhacut.adapters.softmax import Softmax
from mhacut.flatten.attention import FusedFocusedAttention, SeparateFocusedAttention, scale_with_gate
from mhacut.flatten.flatten_cswin import CswinAttention, FocusedLepeAttention, StripeAttention
from mhacut.plan import UnitKind


class FocusedAttentionAdapter(Adapter):
    """Focused linear attention of FLatten with one projection ``qkv``, or with ``q`` and ``kv``.

    Channels are selected, not mixed: a ReLU and a power act on each q/k channel, and a depthwise convolution
    on each v channel. Setting the gate of a q/k feature to 0 gives the outputs without the channel. If heads
    share the filters of the convolution, all heads keep the same v channels, or get copies of the filters.
    """

    family = "attention"
    module_classes: tuple[type[nn.Module], ...] = (
        FusedFocusedAttention,
        SeparateFocusedAttention,
    )

    def branch(self, module: Any) -> tuple[str, Any]:
        """Return the module that has ``scale``, ``positional_encoding`` and ``dwc``, and its name prefix."""
        return "", module

    def describe(self, name: str, module: Any) -> Layer:
        prefix, inner = self.branch(module)
        proj, heads, qk_dim = Projection.of(module, "proj"), inner.num_heads, inner.scale.shape[-1]
        v_width = proj.reads // heads
        if hasattr(module, "kv"):
            places = ("q", 0), ("kv", 0), ("kv", qk_dim)
        else:
            places = ("qkv", 0), ("qkv", qk_dim), ("qkv", 2 * qk_dim)
        query, key, value = (Projection.of(module, part).rows(offset) for part, offset in places)
        values = ActivationHook(places[2][0], "output", places[2][1], width=v_width)
        tables = (ChannelAxis(f"{prefix}{table}", 2) for table in ("scale", "positional_encoding"))
        qk = Unit(
            name,
            "qk",
            heads,
            qk_dim // heads,
            axes=(*query, *key, *tables),
            scale_axes=(),  # 1e-6 is added behind the projections: no factor there removes a channel
            hooks={
                "query": ActivationHook(f"{prefix}query_features", "output"),
                "key": ActivationHook(f"{prefix}key_features", "output"),
                "value": values,
            },
            mixing="select",
            linear=True,
            gate=f"{prefix}feature_gate",
        )
        # d filters serve all heads; a cut with copies has made heads * d of them.
        shared = heads > 1 and inner.dwc.out_channels == v_width
        convolutions = [
            ChannelAxis(f"{prefix}{conv}.{part}", 0, shared=shared and conv == "dwc")
            for conv in ("dwc", "get_v")
            for part in ("weight", "bias")
            if getattr(getattr(inner, conv, None), part, None) is not None
        ]
        biases = tuple(axis for axis in convolutions if axis.tensor.endswith("bias"))
        v = proj.unit(
            name,
            "v",
            (heads, v_width),
            (*value, *convolutions),
            {"value": values},
            sharing="copied" if shared else "own",
            constants=() if proj.bias is None else biases,
        )
        return Layer(name, self, (qk, v))

    def merge_gate(self, module: Any, unit: Unit, channel_scale: Tensor) -> None:
        _, inner = self.branch(module)
        scale = inner.scale
        gate = channel_scale.reshape(-1).to(scale.device)
        merged = scale_with_gate(scale.detach().double(), gate, inner.focusing_factor)
        with torch.no_grad():
            # A gate of 1 must change no bit, which softplus and its inverse might.
            scale.copy_(torch.where(gate == 1, scale, merged.to(scale.dtype)))


class SlimStripeAttention(StripeAttention):
    """Stripe attention of FLatten-CSWin after a cut: q/k and v may have different numbers of channels."""

    def attend_within(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_as(self, q, k, v)


class Stripes(Softmax):
    """Softmax attention of FLatten-CSWin within stripes of the token map.

    With 2 branches, each branch has half of the heads.
    """

    def v(self, name: str, module: Any) -> Unit:
        plain = super().v(name, module)
        share = plain.heads // len(module.attns)
        lepe = [
            ChannelAxis(f"attns.{number}.get_v.{part}", 0, heads=(number * share, (number + 1) * share))
            for part in ("weight", "bias")
            for number in range(len(module.attns))
        ]
        constants = tuple(lepe[len(module.attns) :]) if plain.output_bias is not None else ()
        return replace(plain, axes=(*plain.axes, *lepe), mixing="refit", constants=constants)

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        for attn in module.attns:
            attn.scale = widths["qk"] ** -0.5
            attn.__class__ = StripeAttention if widths["qk"] == widths["v"] else SlimStripeAttention


class CswinAttentionAdapter(FocusedAttentionAdapter):
    """Attention of FLatten-CSWin: input and output projections around branches of linear or stripe attention.

    Rows of ``qkv`` are [q | k | v], each ordered by head. LePE convolves every v channel separately, so v
    channels are selected, not mixed.
    """

    module_classes: tuple[type[nn.Module], ...] = (CswinAttention,)
    stripes = Stripes(CswinAttention, mixins=())

    def branch(self, module: Any) -> tuple[str, Any]:
        return "attns.0.", module.attns[0]

    def describe(self, name: str, module: Any) -> Layer:
        linear = isinstance(module.attns[0], FocusedLepeAttention)
        return super().describe(name, module) if linear else self.stripes.describe(name, module)
