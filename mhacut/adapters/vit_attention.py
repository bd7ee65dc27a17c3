"""``timm.layers.Attention``: the attention of ViT, DeiT, DeiT-3, DINOv2, CLIP, SigLIP and most of timm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.layers import Attention
from torch import Tensor, nn

from mhacut.adapters.attend import attend
from mhacut.adapters.base import ActivationHook, Adapter, ChannelAxis, Layer, Unit
from mhacut.adapters.rows import fused_qk, rows
from mhacut.plan import UnitKind


class SlimAttention(Attention):  # type: ignore[misc]
    """``timm.layers.Attention`` whose heads have ``qk_width`` != ``v_width`` channels.

    Parameters keep timm's names: qkv rows are q [H * qk_width], k [H * qk_width], v [H * v_width].
    Made by :meth:`VitAttentionAdapter.resize`, never constructed.
    """

    qk_width: int
    v_width: int

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, C] to [B, N, C_out], as timm's."""
        batch, tokens, _ = x.shape
        qk_dim, v_dim = self.num_heads * self.qk_width, self.num_heads * self.v_width
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N, d)
            for part in self.qkv(x).split((qk_dim, qk_dim, v_dim), dim=-1)
        )
        out = attend(
            self.q_norm(q),
            self.k_norm(k),
            v,
            scale=self.scale,
            fused=self.fused_attn,
            attn_mask=attn_mask,
            is_causal=is_causal,
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )
        out = self.norm(out.transpose(1, 2).reshape(batch, tokens, v_dim))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        projected: Tensor = self.proj_drop(self.proj(out))
        return projected


class VitAttentionAdapter(Adapter):
    """Fused ``qkv`` with rows [q | k | v], each head-major; ``proj`` reads v head-major."""

    family = "attention"
    module_classes = (Attention, SlimAttention)

    def describe(self, name: str, module: Any) -> Layer:
        heads, (qk_width, v_width) = module.num_heads, _widths(module)
        v_at = 2 * heads * qk_width
        units: list[Unit] = []
        not_prunable: dict[UnitKind, str] = {}

        if _is_identity(module.q_norm) and _is_identity(module.k_norm):
            units.append(fused_qk(name, module, heads, qk_width))
        else:
            not_prunable["qk"] = "q and k are normalised over the channels of a head"

        if _is_identity(module.norm):
            columns = ChannelAxis("proj.weight", 1)
            gate = rows(module, "gate") if module.gate is not None else ()
            units.append(
                Unit(
                    name,
                    "v",
                    heads,
                    v_width,
                    axes=(*rows(module, "qkv", v_at), *gate, columns),
                    scale_axes=(columns,),
                    hooks={
                        "value": ActivationHook("qkv", "output", v_at),
                        "output": ActivationHook("proj", "input"),
                    },
                    output_projection=columns,
                    output_bias="proj.bias" if module.proj.bias is not None else None,
                    mixing="rotate" if module.gate is None else "refit",  # a gate acts on single channels
                )
            )
        else:
            not_prunable["v"] = "a norm before the projection runs over all v channels"
        return Layer(name, self, tuple(units), not_prunable)

    def flops(self, module: Any, input_shape: tuple[int, ...], widths: Mapping[UnitKind, Any]) -> Any:
        batch, tokens, dim = input_shape
        total: Any = 0
        if "qk" in widths:  # q, k projections; q k^T
            total += module.num_heads * widths["qk"] * batch * tokens * (2 * dim + tokens)
        if "v" in widths:  # v projection, gate, A v, output projection
            effective_output_weights = (
                dim + (dim if module.gate is not None else 0) + module.proj.out_features
            )
            total += module.num_heads * widths["v"] * batch * tokens * (effective_output_weights + tokens)
        return total

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> nn.Module:
        old_qk, old_v = _widths(module)
        qk_width, v_width = widths.get("qk", old_qk), widths.get("v", old_v)
        # Same scale in the fused path, the plain path, and for a reader that derives it from the width.
        module.scale = qk_width**-0.5
        module.attn_dim = module.num_heads * v_width
        if qk_width == v_width:
            module.head_dim = v_width
            module.__class__ = Attention
        else:
            module.__class__ = SlimAttention
            module.qk_width, module.v_width = qk_width, v_width
        slim: nn.Module = module
        return slim


def _widths(module: Any) -> tuple[int, int]:
    if isinstance(module, SlimAttention):
        return module.qk_width, module.v_width
    return module.head_dim, module.head_dim


def _is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity
