"""Focused linear attention of the FLatten Transformers, :mod:`mhacut.flatten.attention`.

q/k channels end in a ReLU and a power over all heads, so that they are selected, never mixed; a gate on their
features removes them exactly. v channels pass a depthwise convolution: they are selected too, and where heads
share its filters, either at equal positions or with a copy of the filters for each head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mhacut.adapters.base import ActivationHook, Adapter, ChannelAxis, Layer, Unit
from mhacut.adapters.projection import Projection
from mhacut.flatten.attention import FusedFocusedAttention, SeparateFocusedAttention, scale_with_gate
from mhacut.flatten.flatten_deit import FocusedVitAttention


class FocusedAttentionAdapter(Adapter):
    """One ``qkv``, or ``q`` and ``kv``; widths are read from the tensors."""

    family = "attention"
    module_classes: tuple[type[nn.Module], ...] = (
        FusedFocusedAttention,
        SeparateFocusedAttention,
        FocusedVitAttention,
    )

    def branch(self, module: Any) -> tuple[str, Any]:
        """Prefix of the names and the module that hold ``scale``, ``positional_encoding`` and ``dwc``."""
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
            scale_axes=(),
            hooks={
                "query": ActivationHook(f"{prefix}query_features", "output"),
                "key": ActivationHook(f"{prefix}key_features", "output"),
                "value": values,
            },
            mixing="select",
            linear=True,
            gate=f"{prefix}feature_gate",
        )
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
            scale.copy_(torch.where(gate == 1, scale, merged.to(scale.dtype)))
