"""Focused linear attention, as the FLatten Transformers have it: :mod:`mhacut.flatten.attention`.

q/k channels end in a ReLU and a power over all heads, so that they are chosen, never mixed; removed exactly
they are by a gate on their features. v channels pass a depthwise convolution: chosen as well, and where heads
share its filters, either at equal positions or with a copy of the filters for each head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mhacut.adapters.base import ActivationHook, Adapter, ChannelAxis, Layer, Unit
from mhacut.adapters.rows import rows
from mhacut.flatten.attention import FusedFocusedAttention, SeparateFocusedAttention, scale_with_gate
from mhacut.flatten.flatten_deit import FocusedVitAttention
from mhacut.plan import UnitKind


class FocusedAttentionAdapter(Adapter):
    """Where q, k and v come from is each family's; the rest they share."""

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
        heads = inner.num_heads
        qk_width, v_width = _widths(module, inner)
        query, key, value = _projections(module, heads * qk_width)
        value_tap = ActivationHook(value[0], "output", value[1], width=v_width)
        qk = Unit(
            name,
            "qk",
            heads,
            qk_width,
            axes=(
                *rows(module, *query),
                *rows(module, *key),
                ChannelAxis(f"{prefix}scale", 2),
                ChannelAxis(f"{prefix}positional_encoding", 2),
            ),
            scale_axes=(),
            hooks={
                "query": ActivationHook(f"{prefix}query_features", "output"),
                "key": ActivationHook(f"{prefix}key_features", "output"),
                "value": value_tap,
            },
            linear=True,
            mixing="select",
            gate=f"{prefix}feature_gate",
        )
        columns = ChannelAxis("proj.weight", 1)
        shared = heads > 1 and inner.dwc.out_channels == v_width
        filters = [ChannelAxis(f"{prefix}dwc.weight", 0, shared=shared)]
        biases = []
        if inner.dwc.bias is not None:
            biases.append(ChannelAxis(f"{prefix}dwc.bias", 0, shared=shared))
        if hasattr(inner, "get_v"):
            filters.append(ChannelAxis(f"{prefix}get_v.weight", 0))
            biases.append(ChannelAxis(f"{prefix}get_v.bias", 0))
        v = Unit(
            name,
            "v",
            heads,
            v_width,
            axes=(*rows(module, *value), *filters, *biases, columns),
            scale_axes=(columns,),
            hooks={"value": value_tap, "output": ActivationHook("proj", "input")},
            output_projection=columns,
            output_bias=None if module.proj.bias is None else "proj.bias",
            sharing="copied" if shared else "own",
            constants=() if module.proj.bias is None else tuple(biases),
        )
        return Layer(name, self, (qk, v))

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> nn.Module:
        slim: nn.Module = module
        return slim  # reads its widths from its tensors

    def merge_gate(self, module: Any, unit: Unit, channel_scale: Tensor) -> None:
        _, inner = self.branch(module)
        scale = inner.scale
        gate = channel_scale.reshape(-1).to(scale.device)
        merged = scale_with_gate(scale.detach().double(), gate, inner.focusing_factor)
        with torch.no_grad():
            scale.copy_(torch.where(gate == 1, scale, merged.to(scale.dtype)))


def _widths(module: Any, inner: Any) -> tuple[int, int]:
    return inner.scale.shape[-1] // inner.num_heads, module.proj.in_features // inner.num_heads


def _projections(module: Any, qk_channels: int) -> tuple[tuple[str, int], tuple[str, int], tuple[str, int]]:
    """Linear layer and first row of q, of k and of v."""
    if hasattr(module, "kv"):
        return ("q", 0), ("kv", 0), ("kv", qk_channels)
    return ("qkv", 0), ("qkv", qk_channels), ("qkv", 2 * qk_channels)
