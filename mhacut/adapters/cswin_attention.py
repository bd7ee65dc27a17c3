"""FLatten-CSWin's attention: one pair of projections around branches, linear over the map or in stripes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mhacut.adapters.attend import attend
from mhacut.adapters.base import ActivationHook, ChannelAxis, Layer, Unit
from mhacut.adapters.focused_attention import FocusedAttentionAdapter
from mhacut.adapters.rows import fused_qk, rows
from mhacut.flatten.cswin_attention import CswinAttention, FocusedLepeAttention, StripeAttention
from mhacut.plan import UnitKind


class SlimStripeAttention(StripeAttention):
    """``StripeAttention`` with other widths for q/k than for v. Made by ``resize``, never constructed."""

    def attend_within(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.attn_drop.p if self.training else 0.0
        return attend(q, k, v, scale=self.scale, fused=self.fused_attn, dropout_p=dropout)


class CswinAttentionAdapter(FocusedAttentionAdapter):
    """Fused ``qkv`` with rows [q | k | v], each head-major; of two branches, the first takes half the heads.

    LePE is a convolution of every v channel by itself: v channels are chosen, each head its own.
    """

    module_classes = (CswinAttention,)

    def branch(self, module: Any) -> tuple[str, Any]:
        return "attns.0.", module.attns[0]

    def describe(self, name: str, module: Any) -> Layer:
        if _is_linear(module):
            return super().describe(name, module)
        heads, (qk_width, v_width) = module.num_heads, _widths(module)
        v_at, columns = 2 * heads * qk_width, ChannelAxis("proj.weight", 1)
        qk = fused_qk(name, module, heads, qk_width)
        share = heads // len(module.attns)
        lepe = [
            ChannelAxis(f"attns.{number}.get_v.{part}", 0, heads=(number * share, (number + 1) * share))
            for part in ("weight", "bias")
            for number in range(len(module.attns))
        ]
        v = Unit(
            name,
            "v",
            heads,
            v_width,
            axes=(*rows(module, "qkv", v_at), *lepe, columns),
            scale_axes=(columns,),
            hooks={"value": ActivationHook("qkv", "output", v_at), "output": ActivationHook("proj", "input")},
            output_projection=columns,
            output_bias="proj.bias" if module.proj.bias is not None else None,
            constants=tuple(lepe[len(module.attns) :]) if module.proj.bias is not None else (),
        )
        return Layer(name, self, (qk, v))

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> nn.Module:
        if not _is_linear(module):
            for attn in module.attns:
                attn.scale = widths["qk"] ** -0.5
                attn.__class__ = StripeAttention if widths["qk"] == widths["v"] else SlimStripeAttention
        slim: nn.Module = module
        return slim


def _is_linear(module: Any) -> bool:
    return isinstance(module.attns[0], FocusedLepeAttention)


def _widths(module: Any) -> tuple[int, int]:
    """Of q/k and v, per head."""
    v_dim = module.proj.in_features
    return (module.qkv.out_features - v_dim) // (2 * module.num_heads), v_dim // module.num_heads


def _whole(number: Any) -> Any:
    """A count as a whole number where it is a number; tensors stay, to be differentiated."""
    return round(number) if isinstance(number, (int, float)) else number
