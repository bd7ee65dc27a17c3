"""Attention of a single head on maps, its projections with batch norms: SHViT's and iFormer's."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import iformer, shvit
from torch import Tensor

from mhacut.adapters.rows import Projection
from mhacut.adapters.softmax import Layout, Rows, SoftmaxAdapter, as_map, as_tokens, attend_in


class SlimShsa(shvit.SHSA):  # type: ignore[misc]
    """SHViT's, with any number of v channels. Made by ``resize``, never constructed."""

    num_heads = 1

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same; some of the channels attend, the others go along to the projection."""
        attending, rest = torch.split(x, [self.pdim, self.dim - self.pdim], dim=1)
        rows = as_tokens(self.qkv(self.pre_norm(attending)))[:, None]  # (B, 1, N, 2 d_qk + d_v)
        v_width = rows.shape[-1] - 2 * self.qk_dim
        q, k, v = torch.split(rows, [self.qk_dim, self.qk_dim, v_width], dim=-1)
        out = as_map(attend_in(self, q, k, v), x.shape[2:])
        projected: Tensor = self.proj(torch.cat([out, rest], dim=1))
        return projected


class ShsaAdapter(SoftmaxAdapter):
    """One ``qkv`` with rows [q | k | v]; the projection reads v first, then what did not attend."""

    module_classes = (shvit.SHSA, SlimShsa)

    def layout(self, module: Any) -> Layout:
        qk_width = module.qk_dim
        v_width = Projection.of(module, "proj.1").reads - (module.dim - module.pdim)
        places = Rows("qkv"), Rows("qkv", qk_width), Rows("qkv", 2 * qk_width)
        return Layout(1, qk_width, v_width, *places, "proj.1", v_rotatable=False)

    def tokens(self, module: Any, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
        batch, _, height, width = input_shape
        return batch, height * width, height * width

    def retell(self, module: Any, qk_width: int, v_width: int) -> None:
        module.__class__ = shvit.SHSA if v_width == module.pdim else SlimShsa
        module.qk_dim = qk_width


class ShmaAdapter(SoftmaxAdapter):
    """iFormer's own forward takes any widths; channel i of v, of its gate and of the projection are one."""

    module_classes = (iformer.SHMA,)

    def layout(self, module: Any) -> Layout:
        v_width = Projection.of(module, "proj").reads
        places = Rows("q"), Rows("k"), Rows("v_gate")
        gate = Rows("v_gate", v_width)
        qk_width = Projection.of(module, "q").writes
        return Layout(1, qk_width, v_width, *places, beside_value=(gate,), v_rotatable=False)

    def tokens(self, module: Any, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
        batch, _, height, width = input_shape
        side = module.window_size
        if not side:
            return batch, height * width, height * width
        windows = -(-height // side) * -(-width // side)
        return batch * windows, side * side, side * side


SINGLE_HEAD = (ShsaAdapter(), ShmaAdapter())
