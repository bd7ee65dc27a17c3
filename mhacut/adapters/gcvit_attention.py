"""Global Context ViT's attention in windows, every second layer of it with queries made for all of them.

Those queries come from the stage, once for all its layers: such a layer drops q/k channels from its keys and
keeps which of the stage's queries are left to it. With no queries of its own to mix, it can only choose.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from timm.models.gcvit import WindowAttentionGlobal
from torch import Tensor

from mhacut.adapters.base import ActivationHook, Unit, table_device
from mhacut.adapters.fused import FusedAdapter, FusedForward, Part, Source, by_head

_KEPT = "global_channels"
"""Buffer with where the channels of a slim layer's queries are among the stage's, [H * d]."""


class SlimWindowAttentionGlobal(FusedForward, WindowAttentionGlobal):  # type: ignore[misc]
    """Global Context ViT's attention at any widths."""

    def forward(self: Any, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        """[windows, N, C] to [windows, N, C]; ``q_global``, [B, H, W, C], of every image."""
        if self.use_global:
            assert q_global is not None
            kept = getattr(self, _KEPT, None)
            queries = q_global.flatten(1, 2)
            queries = queries if kept is None else queries[..., kept]
            q = by_head(queries, self.num_heads).repeat_interleave(x.shape[0] // queries.shape[0], dim=0)
            kv, v_dim = self.qkv(x), self.proj.in_features
            k, v = (by_head(part, self.num_heads) for part in kv.split((kv.shape[-1] - v_dim, v_dim), dim=-1))
        else:
            q, k, v = self.heads_of(x)
        out: Tensor = self.finish(self.weigh(q, k, v, self.rel_pos.get_bias()))
        return out


class GcvitAdapter(FusedAdapter):
    """``qkv`` has rows [q | k | v], or [k | v] where queries are the stage's."""

    def widths(self, module: Any) -> tuple[int, int]:
        """Rows of k, and of v, per head."""
        if not module.use_global:
            return super().widths(module)
        v_dim, heads = module.proj.in_features, module.num_heads
        return (module.qkv.out_features - v_dim) // heads, v_dim // heads

    def source(self, module: Any, part: Part) -> Source:
        """There are no rows of q where queries are the stage's."""
        found = super().source(module, part)
        if not module.use_global:
            return found
        missing = module.num_heads * self.widths(module)[0]
        bias = None if found.bias is None else replace(found.bias, offset=found.bias.offset - missing)
        return replace(found, offset=found.offset - missing, bias=bias)

    def qk(self, name: str, module: Any) -> Unit | str:
        """Where queries are the stage's, a unit of keys."""
        if not module.use_global:
            return super().qk(name, module)
        heads, (width, _) = self.heads(module), self.widths(module)
        keys = self.rows(module, "k")
        kept = getattr(module, _KEPT, None)

        def own(_: Any, queries: Tensor) -> Tensor:
            return queries if kept is None else queries[..., kept]

        return Unit(
            name,
            "qk",
            heads,
            width,
            axes=keys,
            scale_axes=keys,
            hooks={"query": ActivationHook("", "input", argument=1, then=own), "key": self.hook(module, "k")},
            softmax_scaled=True,
            mixing="select",
        )

    def flops(self, module: Any, input_shape: tuple[int, ...], widths: Any) -> Any:
        total = super().flops(module, input_shape, widths)
        if module.use_global and "qk" in widths:
            windows, tokens, dim = input_shape
            total = total - windows * tokens * dim * module.num_heads * widths["qk"]
        return total

    def keep(self, module: Any, unit: Unit, kept: Tensor) -> None:
        """Which of the stage's queries are left."""
        if unit.kind != "qk" or not module.use_global:
            return
        kept = kept.to(table_device(module.proj.weight))
        places = (kept + unit.width * kept.new_tensor(range(unit.heads))[:, None]).flatten()
        earlier = getattr(module, _KEPT, None)
        module.register_buffer(_KEPT, places if earlier is None else earlier[places], persistent=False)


GCVIT_ATTENTION = (GcvitAdapter(WindowAttentionGlobal, SlimWindowAttentionGlobal),)
