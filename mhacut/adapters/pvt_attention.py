"""PVTv2's softmax ``Attention``: keys and values of a map that a convolution or pooling has reduced."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from timm.models.pvt_v2 import Attention
from torch import Tensor, nn

from mhacut.adapters.attend import attend
from mhacut.adapters.base import ActivationHook, Adapter, ChannelAxis, Layer, Unit
from mhacut.adapters.rows import rows
from mhacut.plan import UnitKind


class SlimPvtAttention(Attention):  # type: ignore[misc]
    """PVTv2's ``Attention`` at any widths; timm's own can be of its dense widths only.

    Parameters keep timm's names: kv rows are k, v, each head-major. Made by
    :meth:`PvtAttentionAdapter.resize`, never constructed.
    """

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        """[B, N, C] to [B, N, C_out]; ``feat_size`` is the height and width of the map."""
        batch, tokens, _ = x.shape
        reduced = x
        if self.sr is not None:
            grid = x.transpose(1, 2).reshape(batch, -1, feat_size[0], feat_size[1])
            grid = grid if self.pool is None else self.pool(grid)
            reduced = self.norm(self.sr(grid).flatten(2).transpose(1, 2))
            reduced = reduced if self.act is None else self.act(reduced)
        v_dim = self.proj.in_features
        k, v = self.kv(reduced).split((self.kv.out_features - v_dim, v_dim), dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.q(x), k, v))
        out = attend(
            q,
            k,
            v,
            scale=self.scale,
            fused=self.fused_attn,
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )
        projected: Tensor = self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, tokens, v_dim)))
        return projected


class PvtAttentionAdapter(Adapter):
    """``q``, and ``kv`` with rows [k | v], each head-major; the reduction works on the layer's input."""

    family = "attention"
    module_classes = (Attention, SlimPvtAttention)

    def describe(self, name: str, module: Any) -> Layer:
        heads = module.num_heads
        qk_dim, v_dim = module.q.out_features, module.proj.in_features
        query, columns = rows(module, "q"), ChannelAxis("proj.weight", 1)
        qk = Unit(
            name,
            "qk",
            heads,
            qk_dim // heads,
            axes=query + rows(module, "kv"),
            scale_axes=query,
            hooks={"query": ActivationHook("q", "output"), "key": ActivationHook("kv", "output")},
            mixing="rotate",
            softmax_scaled=True,
        )
        v = Unit(
            name,
            "v",
            heads,
            v_dim // heads,
            axes=(*rows(module, "kv", qk_dim), columns),
            scale_axes=(columns,),
            hooks={
                "value": ActivationHook("kv", "output", qk_dim),
                "output": ActivationHook("proj", "input"),
            },
            output_projection=columns,
            output_bias="proj.bias" if module.proj.bias is not None else None,
            mixing="rotate",
        )
        return Layer(name, self, (qk, v))

    def flops(self, module: Any, input_shape: tuple[int, ...], widths: Mapping[UnitKind, Any]) -> Any:
        batch, tokens, dim = input_shape
        keys = _reduced(module, tokens)
        per_qk = dim * (tokens + keys) + tokens * keys
        per_v = dim * keys + module.proj.out_features * tokens + tokens * keys
        return batch * module.num_heads * (widths["qk"] * per_qk + widths["v"] * per_v)

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> nn.Module:
        module.scale = widths["qk"] ** -0.5
        module.__class__ = SlimPvtAttention
        slim: nn.Module = module
        return slim


def _reduced(module: Any, tokens: int) -> int:
    """How many keys ``tokens`` of a map become; of maps that are not square, only if sides divide evenly."""
    if module.pool is not None:
        return int(module.pool.output_size**2)
    if module.sr is None:
        return tokens
    stride, side = int(module.sr.stride[0]), math.isqrt(tokens)
    return (side // stride) ** 2 if side * side == tokens else tokens // stride**2
