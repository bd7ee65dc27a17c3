"""Attention whose q and k are turned by their position (RoPE): EVA-02, DINOv3, RoPE-ViT, PE, Qwen3-ViT, ...

A q/k channel is a pair of rows that turn together: neighbours, or one from each half of a head. Pairs turn at
different speeds, so that they are chosen, each head its own, and never mixed; a slim layer keeps the numbers
of its pairs to look up their angles. v channels do not turn and are free.

Where several heads share keys and values, v is of the heads of those: a channel is read once for each head of
queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from timm.layers.attention import AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor

from mhacut.adapters.base import ActivationHook, ChannelAxis, Unit, table_device
from mhacut.adapters.fused import FusedAdapter, FusedForward, Part, Source, by_head
from mhacut.adapters.rows import rows
from mhacut.plan import UnitKind

SHARED_KEYS = "several heads share their keys"
_KEPT = "turned_channels"
"""Buffer with the numbers of a slim layer's q/k channels in the dense one, [H, d]."""


class RopeForward(FusedForward):
    """How the slim twins compute."""

    def forward(
        self: Any,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """[B, N, C] to [B, N, C_out]; ``rope`` has sines and cosines, [..., N, 2 * dense width]."""
        q, k, v = self.heads_of(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            table = _of_channels(rope, getattr(self, _KEPT, None))
            q, k = (self.turned(part, table).type_as(v) for part in (q, k))
        if _queries_per_key(self) > 1:
            k, v = (part.repeat_interleave(_queries_per_key(self), dim=1) for part in (k, v))
        out = self.norm(self.weigh(q, k, v, attn_mask, is_causal=is_causal))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        projected: Tensor = self.finish(out)
        return projected

    def heads_of(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of one projection or of three; there may be fewer heads of k and v than of q."""
        if self.qkv is not None:
            return super().heads_of(x)
        shared = self.num_heads // _queries_per_key(self)
        q, k = by_head(self.q_proj(x), self.num_heads), by_head(self.k_proj(x), shared)
        return q, k, by_head(self.v_proj(x), shared)

    def turned(self: Any, x: Tensor, table: Tensor) -> Tensor:
        """[B, H, N, d]; tokens before those of the image have no position."""
        prefix = self.num_prefix_tokens
        return torch.cat(
            (x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], table, half=self.rotate_half)), dim=2
        )


class SlimAttentionRope(RopeForward, AttentionRope):  # type: ignore[misc]
    """timm's ``AttentionRope`` at any widths."""


class SlimEvaAttention(RopeForward, EvaAttention):  # type: ignore[misc]
    """EVA's attention at any widths."""


class RopeAdapter(FusedAdapter):
    """One ``qkv``, with its bias in parts or not, or ``q_proj``, ``k_proj`` and ``v_proj``."""

    def source(self, module: Any, part: Part) -> Source:
        """One projection or three."""
        if module.qkv is not None:
            return super().source(module, part)
        projection = f"{part}_proj"
        biased = module.get_submodule(projection).bias is not None
        return Source(projection, 0, ChannelAxis(f"{projection}.bias", 0) if biased else None)

    def widths(self, module: Any) -> tuple[int, int]:
        """Rows of q, and of v, per head."""
        if module.qkv is not None:
            return super().widths(module)
        return int(module.q_proj.out_features) // module.num_heads, int(
            module.proj.in_features
        ) // module.num_heads

    def qk(self, name: str, module: Any) -> Unit | str:
        """Pairs of rows that turn together."""
        plain = super().qk(name, module)
        if isinstance(plain, str) or _queries_per_key(module) > 1:
            return plain if isinstance(plain, str) else SHARED_KEYS
        pairs, half = plain.width // 2, module.rotate_half

        def paired(axes: tuple[ChannelAxis, ...]) -> tuple[ChannelAxis, ...]:
            copies, step = ((0, pairs), 1) if half else ((0, 1), 2)
            return tuple(
                replace(axis, head_step=2 * pairs, channel_step=step, copies=copies) for axis in axes
            )

        return replace(
            plain,
            width=pairs,
            axes=paired(plain.axes),
            scale_axes=paired(plain.scale_axes),
            hooks={name: _of_pairs(hook, plain.heads, pairs, half) for name, hook in plain.hooks.items()},
            mixing="select",
        )

    def v(self, name: str, module: Any) -> Unit | str:
        """As everywhere, but for a gate, which acts on single channels, and for heads that share values."""
        plain = super().v(name, module)
        if isinstance(plain, str):
            return plain
        gate = () if module.gate is None else rows(module, "gate")
        unit = replace(plain, axes=(*plain.axes, *gate), mixing="refit" if gate else plain.mixing)
        queries = _queries_per_key(module)
        if queries == 1:
            return unit
        read = {axis: _by_each(axis, queries, unit.width) for axis in (*unit.scale_axes, *gate)}
        return replace(
            unit,
            heads=unit.heads // queries,
            axes=tuple(read.get(axis, axis) for axis in unit.axes),
            scale_axes=tuple(read[axis] for axis in unit.scale_axes),
            output_projection=read[unit.scale_axes[0]],
            hooks={
                **unit.hooks,
                "output": replace(unit.hooks["output"], then=partial(_apart, unit.width, queries)),
            },
        )

    def flops(self, module: Any, input_shape: tuple[int, ...], widths: Mapping[UnitKind, Any]) -> Any:
        channels = dict(widths)
        if "qk" in widths:
            channels["qk"] = 2 * widths["qk"]
        total = super().flops(module, input_shape, channels)
        if "v" in widths and module.gate is not None:
            batch, tokens, dim = input_shape
            total = total + batch * tokens * dim * module.num_heads * widths["v"]
        if "v" in widths:  # heads that share values make them once
            batch, tokens, dim = input_shape
            spared = module.num_heads - module.num_heads // _queries_per_key(module)
            total = total - batch * tokens * dim * spared * widths["v"]
        return total

    def keep(self, module: Any, unit: Unit, kept: Tensor) -> None:
        """Numbers, in the dense layer, of the channels whose angles the slim one needs."""
        if unit.kind != "qk":
            return
        kept = kept.to(table_device(module.proj.weight))
        if module.rotate_half:
            channels = torch.cat((kept, kept + unit.width), dim=-1)
        else:
            channels = (2 * kept[..., None] + torch.arange(2, device=kept.device)).flatten(1)
        earlier = getattr(module, _KEPT, None)
        if earlier is not None:
            channels = earlier.gather(1, channels)
        module.register_buffer(_KEPT, channels, persistent=False)


def _of_channels(rope: Tensor, channels: Tensor | None) -> Tensor:
    """Sines and cosines, [..., N, 2 * dense], of ``channels`` [H, d]: [..., H, N, 2 * d]."""
    if channels is None:
        return rope
    heads, width = channels.shape
    rope = rope if rope.dim() > 2 else rope[None]
    rope = rope.expand(*rope.shape[:-3], heads, -1, -1)
    index = channels[:, None].expand(*rope.shape[:-1], width)
    return torch.cat([part.gather(-1, index) for part in rope.chunk(2, dim=-1)], dim=-1)


def _of_pairs(hook: ActivationHook, heads: int, pairs: int, half: bool) -> ActivationHook:
    """What flows through ``hook``, the two of a pair apart: [..., 2, heads * pairs]."""

    def split(module: Any, x: Tensor) -> Tensor:
        x = x if hook.then is None else hook.then(module, x)
        x = x[..., hook.offset : hook.offset + heads * 2 * pairs]
        if half:
            return x.reshape(*x.shape[:-1], heads, 2, pairs).transpose(-2, -3).flatten(-2)
        return x.reshape(*x.shape[:-1], heads * pairs, 2).transpose(-1, -2)

    return replace(hook, offset=0, then=split)


def _queries_per_key(module: Any) -> int:
    """Heads of queries that share one of keys and values; EVA's attention does not know of any."""
    queries: int = getattr(module, "num_kv_groups", 1)
    return queries


def _by_each(axis: ChannelAxis, queries: int, width: int) -> ChannelAxis:
    """Head by head of queries, as channels of the heads that those share."""
    return replace(axis, head_step=queries * width, copies=tuple(width * query for query in range(queries)))


def _apart(width: int, queries: int, module: Any, x: Tensor) -> Tensor:
    """[..., N, heads * queries * d], each head of queries an observation: [..., N, queries, heads * d]."""
    x = x.reshape(*x.shape[:-1], -1, queries, width)
    return x.transpose(-2, -3).flatten(-2)


ROPE_ATTENTION = (RopeAdapter(AttentionRope, SlimAttentionRope), RopeAdapter(EvaAttention, SlimEvaAttention))
