"""Classes of softmax attention that are more than a row: what their units are beside those of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mhacut.adapters.base import ActivationHook, ChannelAxis, Layer, Unit, table_device
from mhacut.adapters.rows import Projection
from mhacut.adapters.shapes import by_head, merged
from mhacut.adapters.softmax import Softmax, Twin
from mhacut.adapters.softmax_hooks import KEPT_GLOBAL, own_queries
from mhacut.plan import UnitKind

TURNED = "q and k are turned by their position"
CHEAP = "in a pooling head it costs next to nothing"


class GlobalContext(Softmax):
    """Global Context ViT, where every second layer has queries of its stage, made once for all its layers.

    Such a layer drops q/k channels from its keys and keeps which of the stage's queries are left to it. With
    no queries of its own to mix, it can only select.
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

    def keep(self, module: Any, unit: Unit, kept: Tensor) -> None:
        """Record which of the stage's queries are left."""
        if unit.kind != "qk" or not module.use_global:
            return
        kept = kept.to(table_device(module.proj.weight))
        places = (kept + unit.width * kept.new_tensor(range(unit.heads))[:, None]).flatten()
        earlier = getattr(module, KEPT_GLOBAL, None)
        module.register_buffer(KEPT_GLOBAL, places if earlier is None else earlier[places], persistent=False)


class Sam(Softmax):
    """SAM: the bias of a pair of positions is q times a row of a table, which all heads share.

    Heads keep the same q/k channels, or get tables of their own; channels are selected, because a q mixed for
    k would not fit its table. The softmax scale stays that of the dense layer: the bias is not scaled.
    """

    def not_prunable(self, module: Any) -> dict[UnitKind, str]:
        return super().not_prunable(module) | ({} if module.rope is None else {"qk": TURNED})

    def qk(self, name: str, module: Any) -> Unit:
        plain = super().qk(name, module)
        if not module.use_rel_pos:
            return plain
        shared = plain.heads > 1 and module.rel_pos_h.shape[1] == plain.width
        tables = tuple(ChannelAxis(f"rel_pos_{side}", 1, shared=shared) for side in ("h", "w"))
        axes = (*plain.axes, *tables)
        return replace(plain, axes=axes, mixing="select", sharing="copied" if shared else "own")


class PoolingHead(Softmax):
    """A pooling head: learnt queries look at all tokens once.

    Queries are the same for every image, so that a single PCA channel of q and k of a head is exact where the
    head has one query. The MLP behind ``proj`` sees next to no tokens and is left whole.
    """

    def serves(self, module: Any) -> bool:
        return isinstance(module.q, nn.Linear) and isinstance(module.proj, nn.Linear)

    def not_prunable(self, module: Any) -> dict[UnitKind, str]:
        return super().not_prunable(module) | ({} if module.mlp is None else {"hidden": CHEAP})

    def qk(self, name: str, module: Any) -> Unit:
        return replace(super().qk(name, module), white_inputs=False)

    def describe(self, name: str, module: Any) -> Layer:
        return replace(super().describe(name, module), result="proj")


class MultiQuery(Softmax):
    """MobileNetV4: queries of every head, one head of keys and values for all.

    Channel i of the keys meets channel i of every head's queries: they are tied, and count as one head. What
    every head makes of channel i of the values is read by a column of its own: heads keep the same channels,
    and columns are refitted on those of all heads.
    """

    def qk(self, name: str, module: Any) -> Unit:
        plain, (heads, width) = super().qk(name, module), self.sizes(module)["q"]
        copies = tuple(head * width for head in range(heads))
        query = tuple(replace(axis, copies=copies) for axis in self.axes(module, "q"))
        every_head = ActivationHook("query.proj", "output", then=partial(as_observations, heads))
        return replace(
            plain,
            heads=1,
            axes=(*query, *self.axes(module, "k")),
            scale_axes=query,
            hooks={**plain.hooks, "query": every_head},
        )

    def v(self, name: str, module: Any) -> Unit:
        plain = super().v(name, module)
        value = tuple(replace(axis, shared=True) for axis in self.axes(module, "v"))
        every_head = replace(plain.hooks["value"], then=lambda _, x: x.repeat(1, plain.heads, 1, 1))
        return replace(
            plain,
            axes=(*value, *plain.scale_axes),
            hooks={**plain.hooks, "value": every_head},
            sharing="tied",
        )


def as_observations(heads: int, module: Any, x: Tensor) -> Tensor:
    """[B, heads * d, H, W], each head an observation of its own: [B, H, W, heads, d]."""
    return x.movedim(1, -1).unflatten(-1, (heads, -1))


class ParallelTwin(Twin):
    """The forward pass of a cut :class:`Parallel` block."""

    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """[B, N, C] to the same."""
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


class Parallel(Softmax):
    """A block of attention and an MLP side by side, whose three units are those of a single layer.

    Rows of ``in_proj`` are [hidden | q | k | v], as ``in_split`` says; one projection reads [v | hidden], or
    one each.
    """

    def writers(self, module: Any) -> Mapping[str, str]:
        return {"in_proj": "hqkv"}

    def sizes(self, module: Any) -> dict[str, tuple[int, int]]:
        hidden, qk, _, v = module.in_split
        heads = self.heads(module)
        qk_size, v_heads = (heads, qk // heads), heads // self.query_heads
        return {"h": (1, hidden), "q": qk_size, "k": qk_size, "v": (v_heads, v // v_heads)}

    def describe(self, name: str, module: Any) -> Layer:
        attention = super().describe(name, module)
        return replace(attention, units=(*attention.units, self.hidden(name, module)))

    def v(self, name: str, module: Any) -> Unit:
        return replace(super().v(name, module), output_scale=_layer_scale(module))

    def hidden(self, name: str, module: Any) -> Unit:
        """The unit of the MLP."""
        fused = module.out_proj is not None
        reader = Projection.of(module, "out_proj" if fused else "mlp_out_proj")
        first = module.in_split[3] if fused else 0
        columns = replace(reader.columns(), offset=first)
        bias = () if module.mlp_bias is None else (ChannelAxis("mlp_bias", 0),)
        return Unit(
            name,
            "hidden",
            1,
            module.in_split[0],
            axes=(*self.axes(module, "h"), *bias, columns),
            scale_axes=(columns,),
            hooks={"hidden": reader.hook("input", first)},
            output_projection=columns,
            output_bias=reader.bias,
            output_scale=_layer_scale(module),
        )

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> nn.Module:
        sizes = self.sizes(module)
        kinds: dict[str, UnitKind] = {"h": "hidden", "q": "qk", "k": "qk", "v": "v"}
        module.in_split = [
            sizes[letter][0] * widths.get(kind, sizes[letter][1]) for letter, kind in kinds.items()
        ]
        module.head_dim = module.in_split[1] // sizes["q"][0]
        return super().resize(module, widths)


def _layer_scale(module: Any) -> str | None:
    return None if type(module.ls) is nn.Identity else "ls.gamma"
