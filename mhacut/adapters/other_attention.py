"""Attention in cascades, among channels and without q and k; and attention that is not prunable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import davit, edgenext, xcit
from timm.models.csatv2 import SpatialTransformerBlock
from timm.models.efficientvit_msra import CascadedGroupAttention
from timm.models.gemma4_vit import Gemma4Attention
from timm.models.mvitv2 import MultiScaleAttention, MultiScaleAttentionPoolFirst
from timm.models.volo import OutlookAttention
from torch import Tensor, nn

from mhacut.adapters.attend import as_map, as_tokens, attend_as, by_head, merged
from mhacut.adapters.base import (
    ActivationHook,
    Adapter,
    ChannelAxis,
    Layer,
    Projection,
    Unit,
    mixed,
    table_device,
)
from mhacut.adapters.softmax import FreshBiases, read
from mhacut.plan import UnitKind

_PLACES = "places_of_values"
"""Buffer with the place of each channel of the next head's input among the v channels that a head kept,
[H, d]; for those that it did not keep, one past the last."""


class SlimCascadedGroupAttention(FreshBiases, CascadedGroupAttention):  # type: ignore[misc]
    """Cut attention of Microsoft's EfficientViT, with any widths. Created by ``resize``."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to the same shape."""
        shares, biases = x.chunk(self.num_heads, dim=1), self.get_attention_biases(x.device)
        outputs: list[Tensor] = []
        for head, (qkv, depthwise) in enumerate(zip(self.qkvs, self.dws, strict=True)):
            source = shares[head] + self.passed_on(outputs[-1], head - 1) if head else shares[0]
            q, k, v = torch.split(qkv(source), [self.key_dim, self.key_dim, self.val_dim], dim=1)
            q, k, v = (as_tokens(part)[:, None] for part in (depthwise(q), k, v))  # (B, 1, N, d)
            outputs.append(as_map(merged(attend_as(self, q, k, v, biases[head])), x.shape[2:]))
        return self.proj(torch.cat(outputs, dim=1))

    def passed_on(self, output: Tensor, head: int) -> Tensor:
        """Return the output of ``head`` for the next head, [B, kept, H, W], with 0 for cut channels."""
        places = getattr(self, _PLACES, None)
        if places is None:
            return output
        return torch.cat([output, torch.zeros_like(output[:, :1])], dim=1).index_select(1, places[head])


class CascadedAdapter(Adapter):
    """Heads that feed one another: ``CascadedGroupAttention`` of EfficientViT (Microsoft).

    Every head has a ``qkvs`` of its own, with rows [q | k | v], which reads the sum of a part of the map's
    channels and of the output of the head before. q passes a depthwise convolution, so that q/k channels are
    selected, never mixed; they are scaled behind it. A v channel is read by a column of the projection, and
    by the next head, through the channel of its input to which it is added. Every layer that writes channels
    has a batch norm.
    """

    family = "attention"
    module_classes = (CascadedGroupAttention, SlimCascadedGroupAttention)

    def describe(self, name: str, module: Any) -> Layer:
        heads, qk_width, v_width = module.num_heads, module.key_dim, module.val_dim
        query, key, value = (_rows(module, "qkvs", offset) for offset in (0, qk_width, 2 * qk_width))
        convolved = _rows(module, "dws")
        key_hook = ActivationHook("qkvs.*", "output", qk_width, channel_dim=1)
        qk = Unit(
            name,
            "qk",
            heads,
            qk_width,
            axes=query + key + convolved,
            scale_axes=convolved,
            hooks={"query": ActivationHook("dws.*", "output", channel_dim=1), "key": key_hook},
            softmax_scaled=True,
            mixing="select",
        )
        hooks, more = (
            {"value": replace(key_hook, offset=2 * qk_width)},
            {"scale_axes": value, "feeds": heads > 1},
        )
        v = Projection.of(module, "proj.1").unit(name, "v", (heads, v_width), value, hooks, **more)
        return Layer(name, self, (qk, v), channel_dim=1)

    def record_kept(self, module: Any, unit: Unit, kept: Tensor) -> None:
        """Record which kept channel is added to each channel of the next head's input."""
        if unit.kind != "v":
            return
        kept = kept.to(table_device(module.attention_biases))
        heads, width = kept.shape
        places = getattr(module, _PLACES, None)
        if places is None:
            places = torch.arange(unit.width, device=kept.device).expand(heads, -1)
        # One place more than there are channels: the index of what a former cut has removed already.
        moved = kept.new_full((heads, unit.width + 1), width)
        moved.scatter_(1, kept, torch.arange(width, device=kept.device).expand(heads, -1))
        module.register_buffer(_PLACES, moved.gather(1, places), persistent=False)

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        module.__class__ = SlimCascadedGroupAttention
        module.key_dim, module.val_dim = widths["qk"], widths["v"]
        module.scale = widths["qk"] ** -0.5


def _rows(module: Any, part: str, offset: int = 0) -> tuple[ChannelAxis, ...]:
    """Return the rows from ``offset`` on in the layers ``part``, 1 layer per head."""
    return tuple(
        replace(axis, heads=(head, head + 1))
        for head in range(module.num_heads)
        for axis in Projection.of(module, f"{part}.{head}").rows(offset)
    )


_SHARED_SOFTMAX = "a softmax runs over these channels: without one of them the others would weigh more"


class ChannelTwin(nn.Module):
    """Forward pass of a cut layer, with any widths."""

    spec: ChannelAttention

    def forward(self: Any, x: Tensor) -> Tensor:
        """Map [B, N, C] to [B, N, C_out]."""
        spec: ChannelAttention = self.spec
        heads, kept, uncut = spec.sizes(self)
        sizes = [heads * (kept if part == "x" else uncut) for part in spec.order]
        rows = dict(zip(spec.order, self.qkv(x).split(sizes, dim=-1), strict=True))
        x, y, z = (by_head(rows[part], heads).mT for part in "xyz")  # (B, H, d, N)
        weights = spec.similarity(self, x, y).softmax(dim=-1)  # (B, H, kept, whole)
        if hasattr(self, "attn_drop"):
            weights = self.attn_drop(weights)
        return read(self, (weights @ z).flatten(1, 2).mT)


@dataclass(eq=False)
class ChannelAttention(Adapter):
    """Attention among the channels of a head instead of among tokens: XCiT's, EdgeNeXt's and DaViT's.

    softmax over channels (x y^T) z, with x, y and z of [channels, tokens], from one ``qkv``, each third
    head-major. A channel of x is a row of the result, called v because the projection reads it: it is cut
    exactly, with its column of the projection. Channels of y and z share the softmax: without one of them the
    others would weigh more, so that they are not cut.
    """

    family = "attention"
    read_by = "proj"

    cls: type[nn.Module]
    similarity: Callable[[Any, Tensor, Tensor], Tensor]
    """(module, x [B, H, kept, N], y [B, H, d, N]) -> logits of the softmax, [B, H, kept, d]."""
    order: str = "xyz"
    """Order of the rows of ``qkv``."""
    heads_in: str = "num_heads"
    """Attribute that holds the number of heads."""

    def __post_init__(self) -> None:
        self.twin = mixed("Slim", ChannelTwin, self.cls, spec=self)
        self.module_classes = (self.cls, self.twin)

    def sizes(self, module: Any) -> tuple[int, int, int]:
        """Return heads, output channels per head, and channels per head that share the softmax."""
        heads, kept = getattr(module, self.heads_in), module.proj.in_features
        return heads, kept // heads, (module.qkv.out_features - kept) // (2 * heads)

    def describe(self, name: str, module: Any) -> Layer:
        heads, kept, uncut = self.sizes(module)
        qkv, offset = Projection.of(module, "qkv"), heads * uncut * self.order.index("x")
        value = {"value": qkv.hook("output", offset)}
        v = Projection.of(module, "proj").unit(name, "v", (heads, kept), qkv.rows(offset), value)
        return Layer(name, self, (v,), {"qk": _SHARED_SOFTMAX})

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        module.__class__ = self.twin


def cross_covariance(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT * m.temperature


def scaled_by_width(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Florence-2: divide logits by the root of the number of tokens, or of the width before the cut."""
    return (x * (x.shape[-1] if m.dynamic_scale else m.head_dim) ** -0.5) @ y.mT


CHANNEL_ATTENTION = (
    ChannelAttention(xcit.XCA, cross_covariance),
    ChannelAttention(edgenext.CrossCovarianceAttn, cross_covariance),
    # Its k is x, its v is y and its q is z.
    ChannelAttention(davit.ChannelAttention, lambda m, x, y: (x * m.scale) @ y.mT, order="zxy"),
    ChannelAttention(davit.ChannelAttentionV2, scaled_by_width, heads_in="groups"),
)


class SlimOutlookAttention(OutlookAttention):  # type: ignore[misc]
    """Cut attention of VOLO, with any width. Created by ``resize``."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, H, W, C] to [B, H, W, C_out]."""
        batch, height, width, _ = x.shape
        window, heads = self.kernel_size**2, self.num_heads
        logits = self.attn(as_tokens(self.pool(x.permute(0, 3, 1, 2))))  # (B, N, H * k^4)
        logits = logits.reshape(batch, -1, heads, window, window).transpose(1, 2) * self.scale
        weights = self.attn_drop(logits.softmax(dim=-1))  # (B, H, N, k^2, k^2)
        v = self.unfold(self.v(x).permute(0, 3, 1, 2)).reshape(batch, heads, -1, window, weights.shape[2])
        mixed = (weights @ v.permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2)  # (B, H, d, k^2, N)
        out = F.fold(
            mixed.reshape(batch, -1, weights.shape[2]),
            output_size=(height, width),
            kernel_size=self.kernel_size,
            padding=self.padding,
            stride=self.stride,
        )
        return self.proj_drop(self.proj(out.permute(0, 2, 3, 1)))


class OutlookAdapter(Adapter):
    """VOLO's outlook attention: a linear layer computes weights of neighbouring points, without q, k."""

    family = "attention"
    module_classes = (OutlookAttention, SlimOutlookAttention)

    def describe(self, name: str, module: Any) -> Layer:
        value, proj = Projection.of(module, "v"), Projection.of(module, "proj")
        size, hooks = (module.num_heads, proj.reads // module.num_heads), {"value": value.hook("output")}
        return Layer(name, self, (proj.unit(name, "v", size, value.rows(), hooks, mixing="rotate"),))

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        module.__class__ = SlimOutlookAttention


class UnprunableAdapter(Adapter):
    """Attention classes of which no channel can be cut by itself, for one reason.

    MViT V2 normalises q, k and v over the channels of a head, behind convolutions that all heads share, and
    adds q to the output; Gemma 4 normalises them too. CSATv2 weighs maps by the output of a block whose
    attention and MLP have a single channel.
    """

    family = "attention"

    def __init__(self, classes: tuple[type[nn.Module], ...], reason: str) -> None:
        self.module_classes = classes
        self.reason = reason

    def describe(self, name: str, module: Any) -> Layer:
        return Layer(name, self, (), {"qk": self.reason, "v": self.reason})


UNPRUNABLE = (
    UnprunableAdapter(
        (MultiScaleAttention, MultiScaleAttentionPoolFirst, Gemma4Attention),
        "q, k and v are normalised over the channels of a head",
    ),
    UnprunableAdapter((SpatialTransformerBlock,), "q, k and v are a single channel"),
)
