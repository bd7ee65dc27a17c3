"""Adapter of softmax attention classes, configured by the class's projections and its steps between them.

A class is an entry in :mod:`mhacut.adapters.softmax_table`. The entry defines the prunable channels and the
forward pass of a cut layer, in which q/k and v may have different widths.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhacut.adapters.attend import as_map, attend_as, merged
from mhacut.adapters.base import ActivationHook, Adapter, ChannelAxis, Layer, Mixing, Projection, Unit, mixed
from mhacut.plan import UnitKind

NORMALISED = "q and k are normalised over the channels of a head"
NORM_BEHIND = "a norm before the projection runs over all v channels"

Hook = Callable[..., Any]


@dataclass(frozen=True)
class HeadRows:
    """Rows that a projection has for the heads: head h, channel i is row ``offset + h * stride + i``."""

    projection: Projection
    heads: int
    width: int
    offset: int = 0
    stride: int | None = None
    """Row step from one head to the next. None: the channels per head."""


def read(m: Any, y: Tensor) -> Tensor:
    """Apply the output projection to [..., H * d], with dropout if the class has dropout."""
    y = getattr(m, m.spec.read_by)(y)
    return m.proj_drop(y) if hasattr(m, "proj_drop") else y


def to_tokens(m: Any, y: Tensor, query: Tensor, *_: Any) -> Tensor:
    """Reshape the attention output y [B, N, C] like ``query`` (map or tokens) and apply the projection."""
    return read(m, y.reshape(*query.shape[:-1], -1))


def to_map(m: Any, y: Tensor, query: Tensor, *_: Any) -> Tensor:
    """Apply the output projection to y [B, N, C] and return a map [B, C, height, width]."""
    return read(m, as_map(y, query.shape[2:]))


class Twin(nn.Module):
    """Forward pass of a softmax attention layer after a cut, with any widths of q/k and v.

    :meth:`Softmax.resize` mixes it into the layer's class.
    """

    spec: Softmax
    written_by: tuple[tuple[str, bool, bool, str, tuple[tuple[int, int], ...]], ...]
    """For each projection: its name (empty if the bias is in parts), whether it is a convolution, whether its
    rows are ordered by head, its letters (q, k, v), and heads and channels of each letter."""

    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Any:
        spec: Softmax = self.spec
        args += tuple([options.get(name, default) for name, default in spec.arguments[len(args) :]])
        query, source = spec.inputs(self, x, *args)
        q, k, v = spec.split(self, query, source)  # (B, H, N, d)
        q, k, bias = spec.logits(self, q, k, x, *args)
        y = spec.weigh(self, q, k, v, bias)
        y, *beside = y if isinstance(y, tuple) else (y,)
        out = spec.finish(self, merged(y), query, x, *args)  # of (B, N, H * d)
        return (out, *beside) if beside else out


class FreshBiases:
    """Mixin that gathers position biases in every call.

    timm caches the biases in eval mode with their autograd graph, so that a second backward pass in eval mode
    fails or uses old biases.
    """

    def get_attention_biases(self: Any, device: torch.device) -> Tensor:
        return self.attention_biases[:, self.attention_bias_idxs]

    def train(self: Any, mode: bool = True) -> Any:
        return nn.Module.train(self, mode)


def unmasked(m: Any, q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor, None]:
    """Return q and k, normalised if the layer has q and k norms, and None, because there is no mask."""
    return (m.q_norm(q), m.k_norm(k), None) if hasattr(m, "q_norm") else (q, k, None)


@dataclass(eq=False)
class Softmax(Adapter):
    """Description of a class of softmax attention.

    Defaults describe a plain ViT. Functions take the attention module ``m`` first. In their signatures,
    ``...`` means all further arguments of the forward pass.
    """

    family = "attention"

    cls: type[nn.Module]
    written_by: Mapping[str, str] = field(default_factory=lambda: {"qkv": "qkv"})
    """Projection names, each with the letters of the tensors in its rows, in order: ``q``, ``k``, ``v``, or
    ``g`` for a gate that is cut with v. A module may lack some projections."""
    per_head: bool = False
    """Order of the rows of a fused projection. True: q, k, v of head 0, then q, k, v of head 1. False: q of
    all heads, then k, then v."""
    read_by: str | Callable[[Any], str] = "proj"
    read_beside: Callable[[Any], int] = lambda m: 0
    """Function that returns the number of input channels of the output projection besides the v channels."""
    query_heads: int = 1
    """Number of q heads per v head; k has as many heads as q."""
    inputs: Hook = lambda m, x, *_: (x, x)
    """Function (m, x, ...) that returns the input of the q projection and the input of the k and v
    projections."""
    spread: Callable[[Any, Tensor], Tensor] | None = None
    """Function (m, projection output) that splits the output into windows, [windows of all images, ...,
    channels]. None: no windows."""
    logits: Hook = unmasked
    """Function (m, q, k, x, ...) that returns q and k [B, H, N, d], and a mask or bias [B, H, N, N] for the
    logits."""
    weigh: Hook = attend_as
    """Function (m, q, k, v, bias) that computes the softmax attention, [B, H, N, d], or a tuple with further
    outputs of the layer."""
    finish: Hook = to_tokens
    """Function (m, y [B, N, H * d], input of q, x, ...) that applies the output projection and returns the
    layer's output."""
    mixins: tuple[type, ...] = (Twin,)
    """Base classes of a cut layer's class, before ``cls``. :class:`Twin` replaces the forward pass of
    ``cls``. With an empty tuple, a cut layer keeps the forward pass of ``cls``."""
    fits: Callable[[Any, int, int], bool] = lambda m, qk, v: False
    """Function (m, q/k width, v width) that returns whether the forward pass of ``cls`` supports these
    widths."""
    attributes: Mapping[str, str] = field(default_factory=dict)
    """Size attributes of ``cls`` to update after a cut, each with its value: ``qk``, ``v``, ``heads * qk`` or
    ``heads * v``."""
    scaled: bool = True
    """Whether logits are divided by the square root of the q/k channels per head."""
    cosine: bool = False
    """Whether the layer normalises q and k to unit length, so that a channel scale must multiply both."""
    qk_mixing: Callable[[Any], Mixing] = lambda m: "rotate"
    """Function of the module that returns the :data:`~mhacut.adapters.base.Mixing` of the q/k channels."""
    v_mixing: Mixing = "rotate"
    """:data:`~mhacut.adapters.base.Mixing` of the v channels; ``refit`` if a projection has ``g`` rows."""
    norm_behind: str = ""
    """Name of a norm over all channels between attention and output projection; empty if there is none."""
    v_refusal: str = ""
    """Reason why v channels cannot be pruned; empty if they can."""
    channel_dim: int | None = None
    """Index of the channel dimension in the layer's output. None: as in the output of the output
    projection."""
    result: str = ""
    """Name of the submodule whose output is the layer's output; empty for the layer."""

    def __post_init__(self) -> None:
        self.twin = mixed("Slim", *self.mixins, self.cls, spec=self) if self.mixins else self.cls
        self.module_classes = (self.cls, self.twin)
        further = list(inspect.signature(self.cls.forward).parameters.values())[2:]
        self.arguments = tuple((parameter.name, parameter.default) for parameter in further)
        self.mask_name = next((name for name, _ in self.arguments if "mask" in name), None)
        masks = [name for name, _ in self.arguments if "mask" in name or "causal" in name]
        if masks and self.logits is unmasked and Twin in self.mixins:
            raise TypeError(
                f"{self.cls.__name__}.forward takes {', '.join(masks)}: its row in softmax_table.py needs a "
                "`logits` hook"
            )

    def heads(self, module: Any) -> int:
        heads: int = getattr(module, "num_heads", getattr(module, "heads", 1))
        return heads * self.query_heads

    def reader(self, module: Any) -> Projection:
        return Projection.of(module, self.read_by if isinstance(self.read_by, str) else self.read_by(module))

    def writers(self, module: Any) -> Mapping[str, str]:
        return {
            name: letters
            for name, letters in self.written_by.items()
            if getattr(module, name.partition(".")[0], None) is not None
        }

    def v_size(self, module: Any) -> tuple[int, int]:
        heads = self.heads(module) // self.query_heads
        return heads, (self.reader(module).reads - self.read_beside(module)) // heads

    def sizes(self, module: Any) -> dict[str, tuple[int, int]]:
        """Return (heads, channels per head) of q, k, v and ``g``, the gate that is cut with v."""
        heads, v = self.heads(module), self.v_size(module)
        name, letters = next(item for item in self.writers(module).items() if set(item[1]) & set("qk"))
        # The output projection gives the size of v. The other rows of a fused projection are q and k.
        rows = Projection.of(module, name).writes - v[0] * v[1] * letters.count("v")
        qk = heads, rows // (heads * (letters.count("q") + letters.count("k")))
        return {"q": qk, "k": qk, "v": v, "g": v}

    def parts(self, module: Any) -> dict[str, HeadRows]:
        sizes, parts = self.sizes(module), {}
        for name, letters in self.writers(module).items():
            projection, offset = Projection.of(module, name), 0
            stride = sum(sizes[letter][1] for letter in letters) if self._per_head(module) else None
            for letter in letters:
                heads, width = sizes[letter]
                parts[letter] = HeadRows(projection, heads, width, offset, stride)
                offset += heads * width if stride is None else width
        return parts

    def not_prunable(self, module: Any) -> dict[UnitKind, str]:
        reasons: dict[UnitKind, str] = {}
        if _is_there(module, "q_norm") or _is_there(module, "k_norm"):
            reasons["qk"] = NORMALISED
        if self.norm_behind and _is_there(module, self.norm_behind):
            reasons["v"] = NORM_BEHIND
        if self.v_refusal:
            reasons["v"] = self.v_refusal
        return reasons

    def describe(self, name: str, module: Any) -> Layer:
        reasons, units = self.not_prunable(module), []
        if "qk" not in reasons:
            units.append(self.qk(name, module))
        if "v" not in reasons:
            units.append(self.v(name, module))
        channel_dim = self.reader(module).channel_dim if self.channel_dim is None else self.channel_dim
        return Layer(name, self, tuple(units), reasons, channel_dim, self.result)

    def qk(self, name: str, module: Any) -> Unit:
        query, key = self.axes(module, "q"), self.axes(module, "k")
        hooks = {"query": self.hook(module, "q"), "key": self.hook(module, "k")}
        heads, width = self.sizes(module)["q"]
        if self.cosine:
            hooks = {side: _of_unit_length(hook, heads, width) for side, hook in hooks.items()}
        return Unit(
            name,
            "qk",
            heads,
            width,
            axes=query + key,
            # A factor on a batch norm scales a bias before it too.
            # A scale on q alone is a scale on the logits, unless both are divided by their lengths behind it.
            scale_axes=query + key if self.cosine else query[:1] if query[0].norm else query,
            hooks=hooks,
            mixing=self.qk_mixing(module),
            softmax_scaled=self.scaled,
        )

    def v(self, name: str, module: Any) -> Unit:
        reader, size = self.reader(module), self.v_size(module)
        # A gate multiplies single channels of v: they can be selected and refitted, not mixed.
        tied = "g" in self.parts(module)
        written = self.axes(module, "v") + (self.axes(module, "g") if tied else ())
        mixing, value = "refit" if tied else self.v_mixing, self.hook(module, "v")
        return reader.unit(name, "v", size, written, {"value": value}, mixing=mixing)

    def axes(self, module: Any, letter: str) -> tuple[ChannelAxis, ...]:
        part = self.parts(module)[letter]
        axes = part.projection.rows(part.offset, part.stride)
        if not _has_split_bias(module):
            return axes
        # The bias of k is a constant zero; resize makes a new one.
        return axes[:1] if letter == "k" else (axes[0], ChannelAxis(f"{letter}_bias", 0))

    def hook(self, module: Any, letter: str) -> ActivationHook:
        part, spread = self.parts(module)[letter], self.spread or (lambda m, x: x)
        if _has_split_bias(module):  # no module outputs it: it is computed from the layer's input
            return ActivationHook(
                "", "input", part.offset, then=lambda m, x: spread(m, fused_projection(m, x))
            )
        hook = part.projection.hook("output", part.offset, part.stride)
        return hook if self.spread is None else replace(hook, then=lambda _, x: spread(module, x))

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        sizes = self.sizes(module)
        (_, qk), (heads, v) = sizes["q"], sizes["v"]
        if self.scaled and hasattr(module, "scale"):
            module.scale = qk**-0.5  # timm's own formula; the cut has scaled q so that logits stay
        values = {"qk": qk, "v": v, "heads * qk": heads * qk, "heads * v": heads * v}
        for attribute, value in self.attributes.items():
            setattr(module, attribute, values[value])
        if _has_split_bias(module):
            module.k_bias = module.k_bias.new_zeros(len(module.q_bias))
        # timm's own class where it suffices: other programs recognise and fuse it.
        module.__class__ = self.cls if self.fits(module, qk, v) else self.twin
        if isinstance(module, Twin):
            per_head = self._per_head(module)
            module.written_by = tuple(
                (
                    "" if _has_split_bias(module) else name,
                    Projection.of(module, name).channel_dim == 1,
                    per_head,
                    letters,
                    tuple(sizes[letter] for letter in letters),
                )
                for name, letters in self.writers(module).items()
                if set(letters) & set("qkv")
            )

    def split(self, m: Any, query: Tensor, source: Tensor) -> tuple[Any, Any, Any]:
        """Return q, k and v, each [B, H, N, d]. q is None if the layer has no q projection."""
        by_letter: dict[str, Tensor] = {}
        for name, conv, per_head, letters, sizes in m.written_by:
            x = query if "q" in letters else source
            if "." in name:  # slower
                rows = m.get_submodule(name)(x)
            else:
                rows = getattr(m, name)(x) if name else fused_projection(m, x)
            if self.spread is not None:
                rows = self.spread(m, rows)
            if rows.dim() > 3:  # a map, channels first behind a convolution and last behind a linear layer
                rows = rows.flatten(2).mT if conv else rows.flatten(1, -2)  # (B, N, rows)
            if per_head:
                parts = rows.unflatten(-1, (sizes[0][0], -1)).split([width for _, width in sizes], dim=-1)
            else:
                parts = rows.split([heads * width for heads, width in sizes], dim=-1)
                parts = [part.unflatten(-1, size) for part, size in zip(parts, sizes, strict=True)]
            for letter, part in zip(letters, parts, strict=True):
                by_letter[letter] = part.transpose(1, 2)
        return by_letter.get("q"), by_letter["k"], by_letter["v"]

    def _per_head(self, module: Any) -> bool:
        return self.per_head and getattr(module, "head_first", True)


def fused_projection(m: Any, x: Tensor) -> Tensor:
    """Apply ``m.qkv`` to x [..., C], with separate q, k and v biases if the layer has them."""
    if not _has_split_bias(m):
        return m.qkv(x)
    return F.linear(x, m.qkv.weight, torch.cat((m.q_bias, m.k_bias, m.v_bias)))


def _has_split_bias(module: Any) -> bool:
    return getattr(module, "q_bias", None) is not None


def _is_there(module: Any, name: str) -> bool:
    return type(getattr(module, name, None)) not in (nn.Identity, type(None))


def _of_unit_length(hook: ActivationHook, heads: int, width: int) -> ActivationHook:
    def normalised(module: Any, x: Tensor) -> Tensor:
        x = x if hook.then is None else hook.then(module, x)
        x = x[..., hook.offset : hook.offset + heads * width].unflatten(-1, (heads, width))
        return F.normalize(x, dim=-1).flatten(-2)

    return replace(hook, offset=0, then=normalised)
