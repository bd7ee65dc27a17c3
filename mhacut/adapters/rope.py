"""Attention whose q and k are rotated by their position (RoPE): EVA-02, DINOv3, RoPE-ViT, PE, Qwen3-ViT, ...

A q/k channel is a pair of rows that rotate together: neighbours, or one from each half of a head. Pairs
rotate at different speeds, so that they are selected, each head its own, and never mixed; a cut layer keeps
the numbers of its pairs to look up their angles. v channels do not rotate and can be mixed.

If several heads of q share keys and values, v has as many heads as the keys, and a v channel is read once for
each head of q.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from mhacut.adapters.base import ActivationHook, ChannelAxis, Unit, table_device
from mhacut.adapters.softmax import Hook, Softmax
from mhacut.adapters.softmax_hooks import gated, mask_of
from mhacut.plan import UnitKind

SHARED_KEYS = "several heads share their keys"
_KEPT = "kept_channels"
"""Buffer with the numbers of a cut layer's q/k channels in the dense one, [H, d]."""


def rotated(
    m: Any,
    q: Tensor,
    k: Tensor,
    x: Tensor,
    rope: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> tuple[Any, ...]:
    """Rotate q and k [B, H, N, d] by ``rope``, sines and cosines [..., N, 2 * dense width]."""
    dtype = q.dtype
    q, k = m.q_norm(q), m.k_norm(k)
    if rope is not None:
        table = _angles(rope, getattr(m, _KEPT, None))
        q, k = (_rotate(m, part, table).to(dtype) for part in (q, k))
    return q, k, mask_of(x, attn_mask, is_causal)


def _rotate(m: Any, x: Tensor, table: Tensor) -> Tensor:
    """Rotate all but the prefix tokens, which have no position; there may be queries of those only."""
    if x.shape[2] <= m.num_prefix_tokens:
        return x
    prefix, rest = x[:, :, : m.num_prefix_tokens], x[:, :, m.num_prefix_tokens :]
    return torch.cat((prefix, apply_rot_embed_cat(rest, table, half=m.rotate_half)), dim=2)


def _angles(rope: Tensor, channels: Tensor | None) -> Tensor:
    """Sines and cosines, [..., N, 2 * dense], of ``channels`` [H, d]: [..., H, N, 2 * d]."""
    if channels is None:
        return rope
    heads, width = channels.shape
    rope = rope if rope.dim() > 2 else rope[None]
    rope = rope.expand(*rope.shape[:-3], heads, -1, -1)
    index = channels[:, None].expand(*rope.shape[:-1], width)
    return torch.cat([part.gather(-1, index) for part in rope.chunk(2, dim=-1)], dim=-1)


@dataclass(eq=False)
class Rope(Softmax):
    """Rotary attention with one ``qkv``, whose bias may be in parts, or with a projection each."""

    written_by: Mapping[str, str] = field(
        default_factory=lambda: {"qkv": "qkv", "q_proj": "q", "k_proj": "k", "v_proj": "v", "gate": "g"}
    )
    logits: Hook = rotated
    finish: Hook = gated
    norm_behind: str = "norm"

    def v_size(self, module: Any) -> tuple[int, int]:
        heads, width = super().v_size(module)
        return heads // _queries_per_key(module), width

    def sizes(self, module: Any) -> dict[str, tuple[int, int]]:
        sizes = super().sizes(module)
        (heads, qk), (key_heads, v) = sizes["q"], sizes["v"]
        return sizes | {"k": (key_heads, qk), "g": (heads, v)}

    def not_prunable(self, module: Any) -> dict[UnitKind, str]:
        shared: dict[UnitKind, str] = {"qk": SHARED_KEYS} if _queries_per_key(module) > 1 else {}
        return shared | super().not_prunable(module)

    def qk(self, name: str, module: Any) -> Unit:
        """The unit of pairs of rows that rotate together."""
        plain, half = super().qk(name, module), module.rotate_half
        pairs = plain.width // 2
        copies, step = ((0, pairs), 1) if half else ((0, 1), 2)

        def paired(axes: tuple[ChannelAxis, ...]) -> tuple[ChannelAxis, ...]:
            place = partial(replace, head_step=2 * pairs, channel_step=step, copies=copies)
            return tuple(map(place, axes))

        return replace(
            plain,
            width=pairs,
            axes=paired(plain.axes),
            scale_axes=paired(plain.scale_axes),
            hooks={name: _of_pairs(hook, plain.heads, pairs, half) for name, hook in plain.hooks.items()},
            mixing="select",
        )

    def v(self, name: str, module: Any) -> Unit:
        """The unit of v, of the heads of keys."""
        unit, queries = super().v(name, module), _queries_per_key(module)
        if queries == 1:
            return unit
        copies = tuple(unit.width * query for query in range(queries))
        by_each = partial(replace, head_step=queries * unit.width, copies=copies)
        gate = self.axes(module, "g") if module.gate is not None else ()
        axes = tuple(by_each(axis) if axis in gate else axis for axis in unit.axes)
        output = replace(unit.hooks["output"], then=partial(_apart, unit.width, queries))
        return replace(unit, axes=axes).read_at(by_each(unit.scale_axes[0]), output)

    def keep(self, module: Any, unit: Unit, kept: Tensor) -> None:
        """Record the numbers, in the dense layer, of the channels whose angles the cut one needs."""
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


def _of_pairs(hook: ActivationHook, heads: int, pairs: int, half: bool) -> ActivationHook:
    """Return ``hook`` with the two channels of each pair apart: [..., 2, heads * pairs]."""

    def split(module: Any, x: Tensor) -> Tensor:
        x = x if hook.then is None else hook.then(module, x)
        x = x[..., hook.offset : hook.offset + heads * 2 * pairs]
        if half:
            return x.reshape(*x.shape[:-1], heads, 2, pairs).transpose(-2, -3).flatten(-2)
        return x.reshape(*x.shape[:-1], heads * pairs, 2).transpose(-1, -2)

    return replace(hook, offset=0, then=split)


def _queries_per_key(module: Any) -> int:
    """Number of heads of q that share one head of keys and values; 1 for EVA's attention."""
    return getattr(module, "num_kv_groups", 1)


def _apart(width: int, queries: int, module: Any, x: Tensor) -> Tensor:
    """[..., N, heads * queries * d], each head of q an observation: [..., N, queries, heads * d]."""
    x = x.reshape(*x.shape[:-1], -1, queries, width)
    return x.transpose(-2, -3).flatten(-2)
