"""FLatten-CSWin's attention: one pair of projections around branches, linear over the map or in stripes.

LePE convolves every v channel by itself, so that v channels are selected, each head its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mhacut.adapters.attend import attend_as
from mhacut.adapters.base import ChannelAxis, Layer, Unit
from mhacut.adapters.focused_attention import FocusedAttentionAdapter
from mhacut.adapters.softmax import Softmax
from mhacut.flatten.cswin_attention import CswinAttention, FocusedLepeAttention, StripeAttention
from mhacut.plan import UnitKind


class SlimStripeAttention(StripeAttention):
    """``StripeAttention`` with other widths for q/k than for v. Made by ``resize``, never constructed."""

    def attend_within(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_as(self, q, k, v)


class Stripes(Softmax):
    """Softmax within stripes; of two branches, the first takes half the heads."""

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
    """Fused ``qkv`` with rows [q | k | v], each head-major."""

    module_classes: tuple[type[nn.Module], ...] = (CswinAttention,)
    stripes = Stripes(CswinAttention, mixins=())

    def branch(self, module: Any) -> tuple[str, Any]:
        return "attns.0.", module.attns[0]

    def describe(self, name: str, module: Any) -> Layer:
        linear = isinstance(module.attns[0], FocusedLepeAttention)
        return super().describe(name, module) if linear else self.stripes.describe(name, module)
