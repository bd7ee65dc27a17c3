"""``AttentionPoolLatent``, the pooling head of SigLIP and others: learnt queries look at all tokens once.

Queries are the same for every image. Where a head has one, a single channel of q and k, in the principal
basis, says all that there is to say.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from mhacut.adapters.base import Layer
from mhacut.adapters.fused import NORMALISED
from mhacut.adapters.softmax import Layout, Rows, SoftmaxAdapter, attend_in, heads_of
from mhacut.plan import UnitKind

_CHEAP = "in a pooling head it costs next to nothing"


class SlimAttentionPoolLatent(AttentionPoolLatent):  # type: ignore[misc]
    """timm's, at any widths. Made by ``resize``, never constructed."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """[B, N, C] to [B, C_out], or to [B, queries, C_out] where nothing pools those."""
        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
        v_dim = self.proj.in_features
        k, v = self.kv(x).split((self.kv.out_features - v_dim, v_dim), dim=-1)
        q, k, v = (heads_of(part, self.num_heads) for part in (self.q(self.latent), k, v))
        q, k = self.q_norm(q).expand(x.shape[0], -1, -1, -1), self.k_norm(k)
        x = self.proj_drop(self.proj(attend_in(self, q, k, v, attn_mask)))
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        if self.pool == "token":
            return x[:, 0]
        return x.mean(1) if self.pool == "avg" else x


class PoolingAdapter(SoftmaxAdapter):
    """Rows of ``kv`` are [k | v]. The MLP behind ``proj`` sees next to no tokens and is left whole."""

    module_classes = (AttentionPoolLatent, SlimAttentionPoolLatent)

    def serves(self, module: Any) -> bool:
        return isinstance(module.q, nn.Linear) and isinstance(module.proj, nn.Linear)

    def layout(self, module: Any) -> Layout:
        heads, v_dim = module.num_heads, module.proj.in_features
        qk_dim = module.kv.out_features - v_dim
        places = Rows("q"), Rows("kv"), Rows("kv", qk_dim)
        return Layout(heads, qk_dim // heads, v_dim // heads, *places)

    def describe(self, name: str, module: Any) -> Layer:
        whole = super().describe(name, module)
        not_prunable: dict[UnitKind, str] = {} if module.mlp is None else {"hidden": _CHEAP}
        qk, v = whole.units
        units = [replace(qk, white_inputs=False), v]
        if not isinstance(module.q_norm, nn.Identity):
            units, not_prunable["qk"] = [v], NORMALISED
        return replace(whole, units=tuple(units), not_prunable=not_prunable, result="proj")

    def tokens(self, module: Any, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
        batch, tokens, _ = input_shape
        return batch, module.latent_len, tokens

    def retell(self, module: Any, qk_width: int, v_width: int) -> None:
        module.__class__ = SlimAttentionPoolLatent
