"""Functions for the steps in which an attention class differs from the attention of a plain ViT.

They are values of fields of :class:`~mhacut.adapters.softmax.Softmax`. Their argument ``m`` is the attention
module.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.models.vision_transformer_sam import get_rel_pos
from torch import Tensor, nn

from mhacut.adapters.attend import as_map, as_tokens, attend_as, by_head
from mhacut.adapters.softmax import read

# What q, k and v are made of.


def class_token(m: Any, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Return the class token as the input of q, and all tokens as the input of k and v."""
    return x[:, :1], x


def output_tokens(m: Any, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Return the first tokens as the input of q, and all tokens as the input of k and v."""
    return x[:, : m.output_tokens], x


def tokens_of_map(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    tokens = as_tokens(x)
    return tokens, tokens


def reduced(m: Any, x: Tensor, size: Any = None) -> tuple[Tensor, Tensor]:
    """Return tokens for q, and tokens of the downsampled map for k and v."""
    if m.sr is None:
        return x, x
    source = x.mT if size is None else as_map(x, size)
    source = m.sr(source if getattr(m, "pool", None) is None else m.pool(source))
    source = m.norm(source).mT if size is None else m.norm(as_tokens(source))
    return x, source if getattr(m, "act", None) is None else m.act(source)


def latents(m: Any, x: Tensor, attn_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a pooling head's learnt queries, equal for all images, and the tokens for k and v."""
    if m.pos_embed is not None:
        x = x + m.pos_embed.unsqueeze(0).to(x.dtype)
    return m.latent.expand(x.shape[0], -1, -1), x


def windows(m: Any, x: Tensor, size: Any) -> tuple[Tensor, Tensor]:
    """Twins: pad a map with zeros and split it into windows, [B, rows, columns, side, side, C]."""
    (height, width), side = size, m.ws
    grid = F.pad(x.unflatten(1, (height, width)), (0, 0, 0, -width % side, 0, -height % side))
    grid = grid.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
    return grid, grid


def normed(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = m.norm(x)
    return x, x


def coarse(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """LowFormer: downsample a map [B, C, H, W] by a strided depthwise convolution."""
    if getattr(m, "small_kernels", False):
        x = F.pad(x, (0, -x.shape[3] % m.att_stride, 0, -x.shape[2] % m.att_stride))
    x = m.conv_proj(x)
    return x, x


def attending(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """SHViT: return the first channels of a map, the only channels that the attention reads."""
    x = m.pre_norm(x[:, : m.pdim])
    return x, x


# What happens to q and k, and which mask or bias of positions is added to the logits.


def mask_of(x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    if not is_causal:
        return attn_mask
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()


def masked(m: Any, q: Tensor, k: Tensor, x: Tensor, mask: Any, causal: bool = False) -> tuple[Any, ...]:
    return m.q_norm(q), m.k_norm(k), mask_of(x, mask, causal)


def of_output_tokens(logits: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Return ``logits`` for attention that computes q of the first tokens only, with fewer bias rows."""

    def hook(m: Any, q: Tensor, k: Tensor, x: Tensor, *args: Any) -> tuple[Any, ...]:
        q, k, bias = logits(m, q, k, x, *args)  # bias (..., N or 1, N)
        return q, k, None if bias is None else bias[..., : m.output_tokens, :]

    return hook


def of_windows(bias: Tensor, q: Tensor, mask: Tensor | None) -> Tensor:
    """Add the mask of shifted windows, [windows per image, N, N], to a position bias [1, H, N, N]."""
    if mask is None:
        return bias
    return (bias + mask.unsqueeze(1)).repeat(q.shape[0] // mask.shape[0], 1, 1, 1)


def swin(m: Any, q: Tensor, k: Tensor, x: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
    return q, k, of_windows(m._get_rel_pos_bias(), q, mask)


def cosine(positions: Callable[[Any], Tensor]) -> Callable[..., tuple[Any, ...]]:
    """Swin V2: return the function that normalises q and k and multiplies q by a learnt scale."""

    def logits(m: Any, q: Tensor, k: Tensor, x: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
        scale = m.logit_scale.view(-1, 1, 1).clamp(max=math.log(100)).exp()
        return F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), of_windows(positions(m), q, mask)

    return logits


def swin_v2_positions(m: Any) -> Tensor:
    table = m.cpb_mlp(m.relative_coords_table).view(-1, m.num_heads)
    return 16 * table[m.relative_position_index].sigmoid().movedim(-1, 0).unsqueeze(0)  # (1, H, N, N)


def given(m: Any, q: Tensor, k: Tensor, x: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
    """Return q, k and the bias or sizes of merged tokens, an argument that timm's class does not have."""
    return q, k, bias


class CompleteBias(NamedTuple):
    """Attention bias of merged tokens, in place of a layer's position bias."""

    bias: Tensor | None


def position_bias(m: Any, shared: Tensor | CompleteBias | None) -> Tensor | None:
    """Return the position bias of a layer. ``shared`` is the position bias of all layers."""
    if isinstance(shared, CompleteBias):
        return shared.bias
    if hasattr(m, "rel_pos"):
        return shared if m.rel_pos is None else m.rel_pos.get_bias()
    if m.relative_position_bias_table is None:
        return shared
    bias: Tensor = m._get_rel_pos_bias()  # BEiT adds both
    return bias if shared is None else bias + shared


def rel_pos(m: Any, q: Tensor, k: Tensor, x: Tensor, shared: Tensor | CompleteBias | None) -> tuple[Any, ...]:
    if hasattr(m, "q_norm"):
        q, k = m.q_norm(q), m.k_norm(k)
    return q, k, position_bias(m, shared)


def cached_biases(m: Any, q: Tensor, k: Tensor, x: Tensor) -> tuple[Any, ...]:
    return q, k, m.get_attention_biases(x.device)


def pooled(m: Any, q: Tensor, k: Tensor, x: Tensor) -> tuple[Any, ...]:
    """Hiera: reduce queries to the maximum over each group of tokens."""
    if m.q_stride == 1:
        return q, k, None
    return q.unflatten(-2, (m.q_stride, -1)).amax(dim=-3), k, None


def pooled_on_map(m: Any, q: Tensor, k: Tensor, x: Tensor) -> tuple[Any, ...]:
    if m.q_pool is None:
        return q, k, None
    maps = as_map(q.flatten(0, 1), x.shape[1:3])
    return as_tokens(m.q_pool(maps)).unflatten(0, q.shape[:2]), k, None


KEPT_GLOBAL = "global_channels"
"""Name of the buffer with the indices of a cut layer's q channels in the stage's shared queries, [H * d]."""


def own_queries(m: Any, q_global: Tensor) -> Tensor:
    """GCViT: return the channels of the stage's shared queries [..., C] that a cut layer keeps."""
    kept = getattr(m, KEPT_GLOBAL, None)
    return q_global if kept is None else q_global[..., kept]


def global_queries(m: Any, q: Tensor | None, k: Tensor, x: Tensor, q_global: Tensor) -> tuple[Any, ...]:
    """GCViT: repeat the queries of an image, [B, height, width, C], for all its windows."""
    if m.use_global:
        q = by_head(own_queries(m, q_global.flatten(1, 2)), m.num_heads)
        q = q.repeat_interleave(k.shape[0] // q.shape[0], dim=0)
    return q, k, m.rel_pos.get_bias()


def tables(m: Any, q: Tensor, k: Tensor, x: Tensor, sizes: Tensor | None = None) -> tuple[Any, ...]:
    """SAM: return q, k and a position bias: q times the relative position tables of rows and columns.

    ``sizes`` is a bias of merged tokens, which is added.
    """
    q, k = m.q_norm(q), m.k_norm(k)
    if m.rope is not None:
        table = m.rope.get_embed()
        return apply_rot_embed_cat(q, table).type_as(q), apply_rot_embed_cat(k, table).type_as(k), None
    if not m.use_rel_pos:
        return q, k, sizes
    height, width = x.shape[1:3]
    down, along = (
        get_rel_pos(side, side, _resized(table, 2 * side - 1))
        .unflatten(-1, (-1, q.shape[-1]))
        .expand(-1, -1, m.num_heads, -1)
        for side, table in ((height, m.rel_pos_h), (width, m.rel_pos_w))
    )  # (query, key, H, d)
    grid = q.unflatten(2, (height, width))
    rows = torch.einsum("bnhwc,hknc->bnhwk", grid, down)
    columns = torch.einsum("bnhwc,wknc->bnhwk", grid, along)
    bias = (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)  # (B, H, N, N)
    return q, k, bias if sizes is None else bias + sizes


def _resized(table: Tensor, rows: int) -> Tensor:
    """Resize a table [L, C] to ``rows`` rows, linearly as in timm.

    Not by upsampling, whose FLOPs would grow when heads that share the table get their own tables.
    """
    if len(table) == rows:
        return table
    place = torch.arange(rows, device=table.device) + 0.5
    place = (place * (len(table) / rows) - 0.5).clamp(0, len(table) - 1)
    low = place.long()
    share = (place - low)[:, None].to(table.dtype)
    high = (low + 1).clamp(max=len(table) - 1)
    return table.index_select(0, low) * (1 - share) + table.index_select(0, high) * share


# What weighs v.


def talking_heads(m: Any, q: Tensor, k: Tensor, v: Tensor, sizes: Tensor | None) -> Tensor:
    """CaiT: mix the heads of the attention logits before the softmax, and of the weights after it.

    ``sizes`` are the numbers of patches of merged tokens, [B, N, 1].
    """
    logits = _over_heads(m.proj_l, (q * m.scale) @ k.mT)  # (B, H, N, N)
    if sizes is None:
        weights = _over_heads(m.proj_w, logits.softmax(dim=-1))
    else:
        by_key = sizes.mT[:, None]  # (B, 1, 1, N)
        weights = _over_heads(m.proj_w, (logits + by_key.log()).softmax(dim=-1))
        # The bias behind the softmax counts for every patch of a token.
        weights = weights + (by_key - 1) * m.proj_w.bias[:, None, None]
    return m.attn_drop(weights) @ v


def _over_heads(mixing: Any, x: Tensor) -> Tensor:
    return mixing(x.movedim(1, -1)).movedim(-1, 1)


def content_and_place(m: Any, q: Tensor, k: Tensor, v: Tensor, bias: None) -> Tensor:
    """ConViT: average content and position attention with a learnt weight per head."""
    if m.rel_indices.shape[1] != q.shape[-2]:
        m.rel_indices = m.get_rel_indices(q.shape[-2])
    content = ((q @ k.mT) * m.scale).softmax(dim=-1)  # (B, H, N, N)
    place = m.pos_proj(m.rel_indices).permute(0, 3, 1, 2).softmax(dim=-1)
    share = torch.sigmoid(m.gating_param).view(1, -1, 1, 1)
    weights = (1.0 - share) * content + share * place
    return m.attn_drop(weights / weights.sum(dim=-1, keepdim=True)) @ v


def difference(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Differential attention: the first softmax minus the second, then a norm within each v head."""
    first, second = (attend_as(m, q[:, part::2], k[:, part::2], v, mask) for part in (0, 1))
    return m.sub_norm(first - m._compute_lambda().type_as(q) * second) * (1 - m.lambda_init)


# From the weighted sum of v to the output.


def gated(m: Any, y: Tensor, query: Tensor, x: Tensor, *_: Any) -> Tensor:
    y, gate = m.norm(y), getattr(m, "gate", None)
    return read(m, y if gate is None else y * gate(query).sigmoid())


def pooled_latents(m: Any, y: Tensor, query: Tensor, x: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Return the output of a pooling head: [B, C_out], or [B, queries, C_out] if queries are not pooled."""
    y = read(m, y)
    if m.mlp is not None:
        y = y + m.mlp(m.norm(y))
    if m.pool == "token":
        return y[:, 0]
    return y.mean(1) if m.pool == "avg" else y


def tokens_to_map(m: Any, y: Tensor, query: Tensor, x: Tensor) -> Tensor:
    return as_map(read(m, y), x.shape[2:])


def heads_last(m: Any, y: Tensor, query: Tensor, x: Tensor) -> Tensor:
    """NesT: reorder channels from (H, d) to (d, H), the order that ``proj`` reads."""
    y = y.unflatten(-1, (m.num_heads, -1)).transpose(-1, -2)
    return read(m, y.reshape(*x.shape[:-1], -1))


def unwindowed(m: Any, y: Tensor, query: Tensor, x: Tensor, size: Any) -> Tensor:
    grid = y.reshape(*query.shape[:-1], -1).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return read(m, grid[:, : size[0], : size[1]].flatten(1, 2))


def mask_units(m: Any, x: Tensor) -> Tensor:
    """Hiera: reshape tokens [B, N, C], whose windows interleave, to [B * windows, tokens, C]."""
    if not m.use_mask_unit_attn:
        return x
    count = x.shape[1] // (m.q_stride * m.window_size)
    return x.unflatten(1, (-1, count)).transpose(1, 2).flatten(0, 1)


def from_mask_units(m: Any, y: Tensor, query: Tensor, x: Tensor) -> Tensor:
    return read(m, y.unflatten(0, (x.shape[0], -1)).transpose(1, 2).flatten(1, 2))


def to_pooled_map(m: Any, y: Tensor, query: Tensor, x: Tensor) -> Tensor:
    height = x.shape[1] if m.q_pool is None else x.shape[1] // m.q_pool.stride[0]
    return read(m, y.unflatten(1, (height, -1)))


def upsampled(m: Any, y: Tensor, query: Tensor, x: Tensor) -> Tensor:
    fine = m.upsampling(m.o_proj(as_map(y, query.shape[2:])))
    return fine[..., : x.shape[2], : x.shape[3]]


def with_others(m: Any, y: Tensor, query: Tensor, x: Tensor) -> Tensor:
    return m.proj(torch.cat([as_map(y, x.shape[2:]), x[:, m.pdim :]], dim=1))


def upsampling_reader(m: Any) -> str:
    """LowFormer: return the name of the output projection, a 1x1 or an upsampling transposed convolution."""
    if isinstance(m.o_proj, nn.Conv2d):
        return "o_proj"
    return "upsampling.0" if isinstance(m.upsampling, nn.Sequential) else "upsampling"
