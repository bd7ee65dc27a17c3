"""SAM's attention, in windows or over the map, whose positions weigh q channels.

The bias of a pair of positions is q times a row of a table, which all heads share: heads keep the same q/k
channels, or get tables of their own. They are chosen: a q mixed for k would not fit its table. The softmax
scale stays that of the dense layer, since the bias is not scaled. v is free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from timm.models.vision_transformer_sam import Attention, get_rel_pos
from torch import Tensor, nn

from mhacut.adapters.base import ChannelAxis, Unit
from mhacut.adapters.fused import FusedForward
from mhacut.adapters.token_attention import MapAdapter
from mhacut.plan import UnitKind

TURNED = "q and k are turned by their position"


class SlimSamAttention(FusedForward, Attention):  # type: ignore[misc]
    """SAM's attention at any widths."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Maps, [B, H, W, C] to [B, H, W, C]."""
        q, k, v = self.heads_of(x.flatten(1, 2))
        q, k = self.q_norm(q), self.k_norm(k)
        bias = self.position_bias(q, x.shape[1], x.shape[2]) if self.use_rel_pos else None
        if self.rope is not None:
            table = self.rope.get_embed()
            q, k = (apply_rot_embed_cat(part, table).type_as(v) for part in (q, k))
        out: Tensor = self.finish(self.weigh(q, k, v, bias, scale=self.scale))
        return out.view(*x.shape[:3], -1)

    def position_bias(self: Any, q: Tensor, height: int, width: int) -> Tensor:
        """Of every query, [B, heads, N, d], and every key, [B, heads, N, N]."""
        grid = q.view(*q.shape[:2], height, width, -1)
        down, along = (
            get_rel_pos(side, side, table).unflatten(-1, (-1, q.shape[-1])).expand(-1, -1, self.num_heads, -1)
            for side, table in ((height, self.rel_pos_h), (width, self.rel_pos_w))
        )  # (query, key, heads, d)
        rows = torch.einsum("bnhwc,hknc->bnhwk", grid, down)
        columns = torch.einsum("bnhwc,wknc->bnhwk", grid, along)
        return (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)


class SamAdapter(MapAdapter):
    """Rows of ``qkv`` are [q | k | v]; columns of the tables are q channels."""

    def qk(self, name: str, module: Any) -> Unit | str:
        """With the tables, where there are any."""
        if module.rope is not None:
            return TURNED
        plain = super().qk(name, module)
        if isinstance(plain, str) or not module.use_rel_pos:
            return plain if isinstance(plain, str) else replace(plain, softmax_scaled=False)
        shared = plain.heads > 1 and module.rel_pos_h.shape[1] == plain.width
        tables = tuple(ChannelAxis(f"rel_pos_{side}", 1, shared=shared) for side in ("h", "w"))
        return replace(
            plain,
            axes=(*plain.axes, *tables),
            mixing="select",
            sharing="copied" if shared else "own",
            softmax_scaled=False,
        )

    def flops(self, module: Any, input_shape: tuple[int, ...], widths: Mapping[UnitKind, Any]) -> Any:
        total = super().flops(module, input_shape, widths)
        if "qk" in widths and module.use_rel_pos:
            batch, height, width, _ = input_shape
            total = total + batch * height * width * (height + width) * module.num_heads * widths["qk"]
        return total

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> nn.Module:
        scale = module.scale
        slim = super().resize(module, widths)
        module.scale = scale
        return slim


SAM_ATTENTION = (SamAdapter(Attention, SlimSamAttention),)
