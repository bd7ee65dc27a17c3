"""Adapters of softmax attention classes that need more than fields of :class:`Softmax`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from timm import layers
from timm.layers import apply_rot_embed_cat
from timm.models import beit, eva, vision_transformer_relpos
from torch import Tensor, nn

from mhacut.adapters.attend import by_head, merged
from mhacut.adapters.base import (
    ActivationHook,
    ChannelAxis,
    Layer,
    Mixing,
    Projection,
    Unit,
    mixed,
    table_device,
)
from mhacut.adapters.softmax import Hook, Softmax, Twin
from mhacut.adapters.softmax_hooks import KEPT_GLOBAL, gated, mask_of, masked, own_queries
from mhacut.plan import UnitKind

ROTATED = "q and k are rotated by their position"
NO_PROJECTION = "no projection of the layer reads it"
CHEAP = "in a pooling head it costs next to nothing"


class GlobalContext(Softmax):
    """Attention of Global Context ViT with queries that all layers of a stage share.

    A cut layer selects q/k channels and stores which channels of the shared queries it keeps. Channels are
    not mixed, because the layer has no q projection.
    """

    def writers(self, module: Any) -> Mapping[str, str]:
        return {"qkv": "kv" if module.use_global else "qkv"}

    def qk(self, name: str, module: Any) -> Unit:
        if not module.use_global:
            return super().qk(name, module)
        keys, (heads, width) = self.axes(module, "k"), self.sizes(module)["k"]
        queries = ActivationHook("", "input", argument=1, then=own_queries)
        return Unit(
            name,
            "qk",
            heads,
            width,
            axes=keys,
            scale_axes=keys,
            hooks={"query": queries, "key": self.hook(module, "k")},
            mixing="select",
            softmax_scaled=True,
        )

    def record_kept(self, module: Any, unit: Unit, kept: Tensor) -> None:
        if unit.kind != "qk" or not module.use_global:
            return
        kept = kept.to(table_device(module.proj.weight))
        places = (kept + unit.width * kept.new_tensor(range(unit.heads))[:, None]).flatten()
        earlier = getattr(module, KEPT_GLOBAL, None)
        module.register_buffer(KEPT_GLOBAL, places if earlier is None else earlier[places], persistent=False)


class Sam(Softmax):
    """Attention of SAM.

    Its position bias is q times a table of relative positions that all heads share. Heads keep the same q/k
    channels, or get their own tables. Channels are selected, because mixed q channels would not match the
    table. The softmax scale stays that of the dense layer, because the bias is not scaled.
    """

    def not_prunable(self, module: Any) -> dict[UnitKind, str]:
        return super().not_prunable(module) | ({} if module.rope is None else {"qk": ROTATED})

    def qk(self, name: str, module: Any) -> Unit:
        plain = super().qk(name, module)
        if not module.use_rel_pos:
            return plain
        # As wide as one head: the table is shared. A cut with copies has made it as wide as all heads.
        shared = plain.heads > 1 and module.rel_pos_h.shape[1] == plain.width
        tables = tuple(ChannelAxis(f"rel_pos_{side}", 1, shared=shared) for side in ("h", "w"))
        axes = (*plain.axes, *tables)
        return replace(plain, axes=axes, mixing="select", sharing="copied" if shared else "own")


class PoolingHead(Softmax):
    """Attention pooling head: learnt queries attend to all tokens.

    With 1 query per head, a single PCA channel of q and k per head is exact, because queries are equal for
    all images. The MLP after ``proj`` is not pruned, because it runs on few tokens.
    """

    def serves(self, module: Any) -> bool:
        return isinstance(module.q, nn.Linear) and isinstance(module.proj, nn.Linear)

    def not_prunable(self, module: Any) -> dict[UnitKind, str]:
        return super().not_prunable(module) | ({} if module.mlp is None else {"hidden": CHEAP})

    def qk(self, name: str, module: Any) -> Unit:
        return replace(super().qk(name, module), white_inputs=False)


class Interleaved(Softmax):
    """Attention of NesT, where channel i of head h is input column i * H + h of ``proj``."""

    def v(self, name: str, module: Any) -> Unit:
        plain, (heads, _) = super().v(name, module), self.v_size(module)
        columns = replace(plain.scale_axes[0], head_step=1, channel_step=heads)
        output = replace(plain.hooks["output"], then=lambda _, x: x.unflatten(-1, (-1, heads)).mT.flatten(-2))
        return plain.read_at(columns, output)


class TiedHeads(Softmax):
    """Attention where the q channels of all heads multiply the same tensor.

    All heads keep the same channels and count as 1 head.
    """

    def tied(self, module: Any, letter: str) -> tuple[tuple[ChannelAxis, ...], ActivationHook]:
        """Return the rows of the q or k channels, and a hook that reads all heads as samples of 1 head."""
        part = self.parts(module)[letter]
        stride = part.stride or part.width
        copies = tuple(head * stride for head in range(part.heads))
        axes = part.projection.rows(part.offset)

        def observations(_: Any, x: Tensor) -> Tensor:
            x = x.movedim(1, -1)[..., part.offset :]  # (B, height, width, rows)
            return x.unfold(-1, part.width, stride)[..., : part.heads, :]

        hook = ActivationHook(part.projection.name, "output", then=observations)
        return tuple(replace(axis, copies=copies) for axis in axes), hook


class MultiQuery(TiedHeads):
    """Multi-query attention of MobileNetV4: all heads share 1 head of keys and values.

    All heads therefore keep the same v channels.
    """

    def qk(self, name: str, module: Any) -> Unit:
        plain, (query, hook) = super().qk(name, module), self.tied(module, "q")
        axes, hooks = query + self.axes(module, "k"), {**plain.hooks, "query": hook}
        return replace(plain, heads=1, axes=axes, scale_axes=query, hooks=hooks)

    def v(self, name: str, module: Any) -> Unit:
        plain = super().v(name, module)
        value = tuple(replace(axis, shared=True) for axis in self.axes(module, "v"))
        # The moments are of all heads; the one set of values stands for each of them.
        every_head = replace(plain.hooks["value"], then=lambda _, x: x.repeat(1, plain.heads, 1, 1))
        hooks = {**plain.hooks, "value": every_head}
        return replace(plain, axes=(*value, *plain.scale_axes), hooks=hooks, sharing="tied")


@dataclass(eq=False)
class Positional(TiedHeads):
    """``BottleneckAttn`` and ``HaloAttn`` of ResNets, where a position table multiplies q.

    Heads share the table. q/k channels are selected, because mixed q channels would not match the table. The
    softmax scale stays that of the dense layer. v is not prunable, because no output projection reads v.
    """

    mixins: tuple[type, ...] = ()
    attributes: Mapping[str, str] = field(
        default_factory=lambda: {"dim_head_qk": "qk", "dim_out_qk": "heads * qk"}
    )
    scaled: bool = False
    qk_mixing: Callable[[Any], Mixing] = lambda m: "select"
    v_refusal: str = NO_PROJECTION
    channel_dim: int | None = 1

    def v_size(self, module: Any) -> tuple[int, int]:
        return module.num_heads, module.dim_head_v

    def qk(self, name: str, module: Any) -> Unit:
        (query, query_hook), (key, key_hook) = self.tied(module, "q"), self.tied(module, "k")
        tables = (ChannelAxis(f"pos_embed.{side}_rel", 1) for side in ("height", "width"))
        return replace(
            super().qk(name, module),
            heads=1,
            axes=(*query, *key, *tables),
            scale_axes=query,
            hooks={"query": query_hook, "key": key_hook},
        )

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        super().resize(module, widths)
        module.pos_embed.dim_head = widths["qk"]


class ParallelTwin(Twin):
    """Forward pass of a :class:`Parallel` block after a cut."""

    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
        spec: Parallel = self.spec
        args += tuple([options.get(name, default) for name, default in spec.arguments[len(args) :]])
        hidden, q, k, v = self.in_proj(self.in_norm(x)).split(self.in_split, dim=-1)
        sizes = spec.sizes(self)
        q, k, v = (by_head(part, sizes[letter][0]) for letter, part in zip("qkv", (q, k, v), strict=True))
        q, k, mask = spec.logits(self, q, k, x, *args)
        attended = merged(spec.weigh(self, q, k, v, mask))  # (B, N, H * d)
        hidden = self.mlp_drop(self.mlp_act(hidden if self.mlp_bias is None else hidden + self.mlp_bias))
        if self.out_proj is not None:
            out = self.out_proj(torch.cat((attended, hidden), dim=-1))
        else:
            out = self.attn_out_proj(attended) + self.mlp_out_proj(hidden)
        return x + self.drop_path(self.ls(out))


@dataclass(eq=False)
class Parallel(Softmax):
    """Transformer block with parallel attention and MLP, described as 1 layer with qk, v and hidden units.

    Rows of ``in_proj`` are [hidden | q | k | v], of sizes ``in_split``. Either 1 output projection reads [v |
    hidden], or 2 projections read v and hidden.
    """

    written_by: Mapping[str, str] = field(default_factory=lambda: {"in_proj": "hqkv"})
    logits: Hook = masked
    mixins: tuple[type, ...] = (ParallelTwin,)

    def v_size(self, module: Any) -> tuple[int, int]:
        heads = self.heads(module) // self.query_heads
        return heads, module.in_split[3] // heads

    def sizes(self, module: Any) -> dict[str, tuple[int, int]]:
        heads = self.heads(module)
        qk = heads, module.in_split[1] // heads
        return {"h": (1, module.in_split[0]), "q": qk, "k": qk, "v": self.v_size(module)}

    def describe(self, name: str, module: Any) -> Layer:
        attention = super().describe(name, module)
        return replace(attention, units=(*attention.units, self.hidden(name, module)))

    def v(self, name: str, module: Any) -> Unit:
        return replace(super().v(name, module), output_scale=_layer_scale(module))

    def hidden(self, name: str, module: Any) -> Unit:
        fused = module.out_proj is not None
        reader = Projection.of(module, "out_proj" if fused else "mlp_out_proj")
        written = self.axes(module, "h")
        if module.mlp_bias is not None:
            written += (ChannelAxis("mlp_bias", 0),)
        scale = _layer_scale(module)
        unit = reader.unit(name, "hidden", (1, module.in_split[0]), written, {}, output_scale=scale)
        if not fused:
            return unit
        first = module.in_split[3]
        return unit.read_at(replace(reader.columns(), offset=first), reader.hook("input", first))

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        sizes = self.sizes(module)
        kinds: dict[str, UnitKind] = {"h": "hidden", "q": "qk", "k": "qk", "v": "v"}
        module.in_split = [
            sizes[letter][0] * widths.get(kind, sizes[letter][1]) for letter, kind in kinds.items()
        ]
        module.head_dim = module.in_split[1] // sizes["q"][0]
        super().resize(module, widths)


def _layer_scale(module: Any) -> str | None:
    return None if type(module.ls) is nn.Identity else "ls.gamma"


class OutputTokens:
    """Mixin for an attention class: q is computed for the first tokens only, k and v for all tokens.

    :func:`mhacut.surgery.output_tokens.attend_from_output_tokens` mixes it into the attention of the last ViT
    block.
    """

    output_tokens: int
    """Number of first tokens for which q is computed."""


OUTPUT_TOKENS: Mapping[type[nn.Module], Any] = {
    cls: mixed("OutputTokens", OutputTokens, cls)
    for cls in (
        layers.Attention,
        layers.attention.AttentionRope,
        eva.EvaAttention,
        beit.Attention,
        vision_transformer_relpos.RelPosAttention,
    )
}
"""Attention classes, each mapped to its subclass that computes q for the first tokens only."""


CLS_WEIGHTS: Mapping[type[nn.Module], Any] = {cls: mixed("ClsWeights", cls) for cls in OUTPUT_TOKENS}
"""Attention classes, each mapped to its subclass that also returns the class token's attention weights, [B,
H, N], for token merging."""


SHARED_KEYS = "several heads share their keys"
KEPT = "kept_channels"
"""Name of the buffer with the indices of a cut layer's q/k channels in the dense layer, [H, d]."""


def rotated(
    m: Any,
    q: Tensor,
    k: Tensor,
    x: Tensor,
    rope: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> tuple[Any, ...]:
    """Rotate q and k [B, H, N, d] by ``rope``, sines and cosines [..., N, 2 * dense channels per head]."""
    dtype = q.dtype
    q, k = m.q_norm(q), m.k_norm(k)
    if rope is not None:
        table = _angles(rope, getattr(m, KEPT, None))
        q, k = (_rotate(m, part, table).to(dtype) for part in (q, k))
    return q, k, mask_of(x, attn_mask, is_causal)


def _rotate(m: Any, x: Tensor, table: Tensor) -> Tensor:
    if x.shape[2] <= m.num_prefix_tokens:  # the last block of a model that computes the class token alone
        return x
    prefix, rest = x[:, :, : m.num_prefix_tokens], x[:, :, m.num_prefix_tokens :]
    return torch.cat((prefix, apply_rot_embed_cat(rest, table, half=m.rotate_half)), dim=2)


def _angles(rope: Tensor, channels: Tensor | None) -> Tensor:
    """Return the sines and cosines of the kept ``channels`` [H, d], as [..., H, N, 2 * d]."""
    if channels is None:
        return rope
    heads, width = channels.shape
    if rope.dim() == 4 and rope.shape[1] == 1:  # a table per image: whole columns are faster to copy
        columns = torch.cat((channels, channels + rope.shape[-1] // 2), dim=-1)  # (H, 2 * d)
        return rope[:, 0].index_select(-1, columns.flatten()).unflatten(-1, columns.shape).transpose(1, 2)
    rope = rope if rope.dim() > 2 else rope[None]
    rope = rope.expand(*rope.shape[:-3], heads, -1, -1)
    index = channels[:, None].expand(*rope.shape[:-1], width)
    return torch.cat([part.gather(-1, index) for part in rope.chunk(2, dim=-1)], dim=-1)


@dataclass(eq=False)
class Rope(Softmax):
    """Rotary attention (RoPE): EVA-02, DINOv3, RoPE-ViT, PE, Qwen3-ViT, ...

    A q/k channel is a pair of rows that rotate together: neighbours, or 1 row from each half of a head. Each
    head selects its own pairs, because pairs rotate at different speeds and cannot be mixed. A cut layer
    stores the indices of its pairs to look up their angles. v channels do not rotate and can be mixed. If
    several q heads share a k and v head, each of them reads its v channels.
    """

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
        plain, half = super().qk(name, module), _by_halves(module)
        pairs = plain.width // 2
        # Channel i of a half-turned head rotates with channel i + d / 2, else with its neighbour.
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
        unit, queries = super().v(name, module), _queries_per_key(module)
        if queries == 1:
            return unit
        copies = tuple(unit.width * query for query in range(queries))
        # One value channel is read by the columns of all queries that share its head.
        by_each = partial(replace, head_step=queries * unit.width, copies=copies)
        gate = self.axes(module, "g") if module.gate is not None else ()
        axes = tuple(by_each(axis) if axis in gate else axis for axis in unit.axes)
        output = replace(unit.hooks["output"], then=partial(_apart, unit.width, queries))
        return replace(unit, axes=axes).read_at(by_each(unit.scale_axes[0]), output)

    def record_kept(self, module: Any, unit: Unit, kept: Tensor) -> None:
        if unit.kind != "qk":
            return
        kept = kept.to(table_device(self.reader(module).linear.weight))
        if _by_halves(module):
            channels = torch.cat((kept, kept + unit.width), dim=-1)
        else:
            channels = (2 * kept[..., None] + torch.arange(2, device=kept.device)).flatten(1)
        earlier = getattr(module, KEPT, None)  # of a model that was cut before: angles are the dense ones
        if earlier is not None:
            channels = earlier.gather(1, channels)
        module.register_buffer(KEPT, channels, persistent=False)


def _of_pairs(hook: ActivationHook, heads: int, pairs: int, half: bool) -> ActivationHook:
    def split(module: Any, x: Tensor) -> Tensor:
        x = x if hook.then is None else hook.then(module, x)
        x = x[..., hook.offset : hook.offset + heads * 2 * pairs]
        if half:
            return x.reshape(*x.shape[:-1], heads, 2, pairs).transpose(-2, -3).flatten(-2)
        return x.reshape(*x.shape[:-1], heads * pairs, 2).transpose(-1, -2)

    return replace(hook, offset=0, then=split)


def _by_halves(module: Any) -> bool:
    """Whether a channel pair is 1 channel from each half of a head. True for all classes outside timm."""
    return getattr(module, "rotate_half", True)


def _queries_per_key(module: Any) -> int:
    """Number of q heads per k head; 1 for the attention of EVA."""
    return getattr(module, "num_kv_groups", 1)


def _apart(width: int, queries: int, module: Any, x: Tensor) -> Tensor:
    x = x.reshape(*x.shape[:-1], -1, queries, width)
    return x.transpose(-2, -3).flatten(-2)
