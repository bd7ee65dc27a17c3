"""Adapters of cascaded, channel and outlook attention, and of attention that is not prunable."""

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
"""Name of a buffer, [H, d]: for each channel of the next head's input, the index of the v channel that is
added to it among the kept v channels of a head. Removed channels have the index after the last kept
channel."""


class SlimCascadedGroupAttention(FreshBiases, CascadedGroupAttention):  # type: ignore[misc]
    """Cascaded group attention of EfficientViT (Microsoft) after a cut."""

    def forward(self, x: Tensor) -> Tensor:
        shares, biases = x.chunk(self.num_heads, dim=1), self.get_attention_biases(x.device)
        outputs: list[Tensor] = []
        for head, (qkv, depthwise) in enumerate(zip(self.qkvs, self.dws, strict=True)):
            source = shares[head] + self.passed_on(outputs[-1], head - 1) if head else shares[0]
            q, k, v = torch.split(qkv(source), [self.key_dim, self.key_dim, self.val_dim], dim=1)
            q, k, v = (as_tokens(part)[:, None] for part in (depthwise(q), k, v))  # (B, 1, N, d)
            outputs.append(as_map(merged(attend_as(self, q, k, v, biases[head])), x.shape[2:]))
        return self.proj(torch.cat(outputs, dim=1))

    def passed_on(self, output: Tensor, head: int) -> Tensor:
        """Return the part of the next head's input that ``head`` computes, with 0 for removed channels."""
        places = getattr(self, _PLACES, None)
        if places is None:
            return output
        return torch.cat([output, torch.zeros_like(output[:, :1])], dim=1).index_select(1, places[head])


class CascadedAdapter(Adapter):
    """Cascaded group attention of EfficientViT (Microsoft), whose heads feed one another.

    Each head reads a part of the map's channels plus the output of the previous head, and has its own
    ``qkvs`` with rows [q | k | v]. q/k channels are selected, not mixed, because q passes a depthwise
    convolution. A v channel is read by the output projection and, by addition to an input channel, by the
    next head.
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
        """Store, for each input channel of the next head, the index of the kept v channel added to it."""
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
    return tuple(
        replace(axis, heads=(head, head + 1))
        for head in range(module.num_heads)
        for axis in Projection.of(module, f"{part}.{head}").rows(offset)
    )


_SHARED_SOFTMAX = "a softmax runs over these channels: without one of them the others would weigh more"


class ChannelTwin(nn.Module):
    """Forward pass of channel attention after a cut."""

    spec: ChannelAttention

    def forward(self: Any, x: Tensor) -> Tensor:
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
    """Attention among the channels of a head instead of among tokens: XCiT, EdgeNeXt and DaViT.

    The output is softmax over channels (x y^T) z, with x, y and z [channels, tokens] from the thirds of
    ``qkv``. A channel of x gives 1 output row, which 1 column of the output projection reads. Channels of x
    are therefore cut exactly, as kind v. Channels of y and z are not cut, because removing one would raise
    the softmax weights of the others.
    """

    family = "attention"
    read_by = "proj"

    cls: type[nn.Module]
    similarity: Callable[[Any, Tensor, Tensor], Tensor]
    """Function (module, x [B, H, kept, N], y [B, H, d, N]) that returns logits [B, H, kept, d]."""
    order: str = "xyz"
    """Letters of the tensors x, y and z in the order of the ``qkv`` rows."""
    heads_in: str = "num_heads"
    """Name of the module attribute that holds the number of heads."""

    def __post_init__(self) -> None:
        self.twin = mixed("Slim", ChannelTwin, self.cls, spec=self)
        self.module_classes = (self.cls, self.twin)

    def sizes(self, module: Any) -> tuple[int, int, int]:
        """Return the number of heads, output channels per head, and channels per softmax."""
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
    """Divide Florence-2's logits by the root of the number of tokens, or of the head width before the cut."""
    return (x * (x.shape[-1] if m.dynamic_scale else m.head_dim) ** -0.5) @ y.mT


CHANNEL_ATTENTION = (
    ChannelAttention(xcit.XCA, cross_covariance),
    ChannelAttention(edgenext.CrossCovarianceAttn, cross_covariance),
    # Its k is x, its v is y and its q is z.
    ChannelAttention(davit.ChannelAttention, lambda m, x, y: (x * m.scale) @ y.mT, order="zxy"),
    ChannelAttention(davit.ChannelAttentionV2, scaled_by_width, heads_in="groups"),
)


class SlimOutlookAttention(OutlookAttention):  # type: ignore[misc]
    """Outlook attention of VOLO after a cut."""

    def forward(self, x: Tensor) -> Tensor:
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
    """Outlook attention of VOLO: a linear layer computes the attention weights, so there is no q and k."""

    family = "attention"
    module_classes = (OutlookAttention, SlimOutlookAttention)

    def describe(self, name: str, module: Any) -> Layer:
        value, proj = Projection.of(module, "v"), Projection.of(module, "proj")
        size, hooks = (module.num_heads, proj.reads // module.num_heads), {"value": value.hook("output")}
        return Layer(name, self, (proj.unit(name, "v", size, value.rows(), hooks, mixing="rotate"),))

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        module.__class__ = SlimOutlookAttention


class UnprunableAdapter(Adapter):
    """Attention classes whose channels cannot be cut exactly: MViT V2, Gemma 4 and CSATv2.

    MViT V2 and Gemma 4 normalise q, k and v over the channels of a head. MViT V2 also shares convolutions
    among heads and adds q to the output. CSATv2 has attention with a single channel.
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
