"""Heads that feed one another: ``CascadedGroupAttention`` of EfficientViT (Microsoft).

Every head has a ``qkvs`` of its own, which reads the sum of a part of the map's channels and of the output of
the head before. q passes a depthwise convolution, so that q/k channels are selected, never mixed; they are
scaled behind it. A v channel is read by a column of the projection, and by the next head, through the channel
of its input to which it is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from timm.models.efficientvit_msra import CascadedGroupAttention
from torch import Tensor

from mhacut.adapters.attend import attend_as
from mhacut.adapters.base import ActivationHook, Adapter, ChannelAxis, Layer, Unit, table_device
from mhacut.adapters.projection import Projection
from mhacut.adapters.shapes import as_map, as_tokens, merged
from mhacut.adapters.softmax import FreshBiases
from mhacut.plan import UnitKind

_PLACES = "places_of_values"
"""Buffer with the place of each channel of the next head's input among the v channels that a head kept,
[H, d]; for those that it did not keep, one past the last."""


class SlimCascadedGroupAttention(FreshBiases, CascadedGroupAttention):  # type: ignore[misc]
    """EfficientViT's attention, at any widths. Made by ``resize``, never constructed."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        shares, biases = x.chunk(self.num_heads, dim=1), self.get_attention_biases(x.device)
        outputs: list[Tensor] = []
        for head, (qkv, depthwise) in enumerate(zip(self.qkvs, self.dws, strict=True)):
            source = shares[head] + self.passed_on(outputs[-1], head - 1) if head else shares[0]
            q, k, v = torch.split(qkv(source), [self.key_dim, self.key_dim, self.val_dim], dim=1)
            q, k, v = (as_tokens(part)[:, None] for part in (depthwise(q), k, v))  # (B, 1, N, d)
            outputs.append(as_map(merged(attend_as(self, q, k, v, biases[head])), x.shape[2:]))
        return self.proj(torch.cat(outputs, dim=1))

    def passed_on(self, output: Tensor, head: int) -> Tensor:
        """Return the output of ``head``, [B, kept, H, W], with zeros for channels that were cut."""
        places = getattr(self, _PLACES, None)
        if places is None:
            return output
        return torch.cat([output, torch.zeros_like(output[:, :1])], dim=1).index_select(1, places[head])


class CascadedAdapter(Adapter):
    """Rows of each of ``qkvs`` are [q | k | v]; every layer that writes channels has a batch norm."""

    family = "attention"
    module_classes = (CascadedGroupAttention, SlimCascadedGroupAttention)

    def describe(self, name: str, module: Any) -> Layer:
        heads, qk_width, v_width = module.num_heads, module.key_dim, module.val_dim
        query, key, value = (_rows(module, "qkvs", offset) for offset in (0, qk_width, 2 * qk_width))
        convolved = _rows(module, "dws")
        key_hook = ActivationHook("qkvs.*", "output", qk_width, channel_dim=1)
        qk = Unit(
            name,
            "qk",
            heads,
            qk_width,
            axes=query + key + convolved,
            scale_axes=convolved,
            hooks={"query": ActivationHook("dws.*", "output", channel_dim=1), "key": key_hook},
            softmax_scaled=True,
            mixing="select",
        )
        hooks, more = (
            {"value": replace(key_hook, offset=2 * qk_width)},
            {"scale_axes": value, "feeds": heads > 1},
        )
        v = Projection.of(module, "proj.1").unit(name, "v", (heads, v_width), value, hooks, **more)
        return Layer(name, self, (qk, v), channel_dim=1)

    def keep(self, module: Any, unit: Unit, kept: Tensor) -> None:
        """Record which kept channel is added to each channel of the next head's input."""
        if unit.kind != "v":
            return
        kept = kept.to(table_device(module.attention_biases))
        heads, width = kept.shape
        places = getattr(module, _PLACES, None)
        if places is None:
            places = torch.arange(unit.width, device=kept.device).expand(heads, -1)
        moved = kept.new_full((heads, unit.width + 1), width)
        moved.scatter_(1, kept, torch.arange(width, device=kept.device).expand(heads, -1))
        module.register_buffer(_PLACES, moved.gather(1, places), persistent=False)

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        module.__class__ = SlimCascadedGroupAttention
        module.key_dim, module.val_dim = widths["qk"], widths["v"]
        module.scale = widths["qk"] ** -0.5


def _rows(module: Any, part: str, offset: int = 0) -> tuple[ChannelAxis, ...]:
    """Rows from ``offset`` on of the layers ``part``, one for each head."""
    return tuple(
        replace(axis, heads=(head, head + 1))
        for head in range(module.num_heads)
        for axis in Projection.of(module, f"{part}.{head}").rows(offset)
    )
