"""Attention whose cost is linear in the number of tokens: keys meet values, or are summed, before queries."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.lambda_layer import LambdaLayer
from timm.models.coat import CoaT, FactorAttnConvRelPosEnc
from timm.models.efficientvit_mit import LiteMLA
from timm.models.mobilevit import LinearSelfAttention
from timm.models.swiftformer import EfficientAdditiveAttention
from torch import Tensor, nn

from mhacut.adapters.attend import by_head, merged
from mhacut.adapters.base import ActivationHook, Adapter, ChannelAxis, Layer, Projection, Unit
from mhacut.adapters.softmax_special import NO_PROJECTION
from mhacut.plan import UnitKind


class AdditiveAdapter(Adapter):
    """SwiftFormer's attention: every key is multiplied by the weighted sum of all queries.

    Channel i of the sum meets channel i of the keys; output i of a projection of the products is added to
    channel i of the queries, and read. So channel i of queries, keys and projection are cut together, as qk;
    there is no v. Queries and keys have unit length over all channels. So a channel is removed exactly if it
    is zero in both and not read either, because the projection writes to it what it reads from others.
    """

    family = "attention"
    module_classes = (EfficientAdditiveAttention,)

    def heads(self, module: Any) -> int:
        """Return 1: all heads compute the same."""
        return 1

    def describe(self, name: str, module: Any) -> Layer:
        names = ("to_query", "to_key", "proj", "final")
        query, key, proj, final = (Projection.of(module, part) for part in names)
        scaled = (*query.rows(), *key.rows(), final.columns())
        qk = Unit(
            name,
            "qk",
            1,
            query.writes,
            axes=(*scaled, ChannelAxis("w_g", 0), *proj.rows(), proj.columns()),
            scale_axes=scaled,
            hooks={
                side: ActivationHook(f"to_{side}", "output", then=lambda _, x: F.normalize(x, dim=-1))
                for side in ("query", "key")
            },
            mixing="select",
        )
        return Layer(name, self, (qk,), channel_dim=1)


class SeparableAdapter(Adapter):
    """MobileViTv2's attention: rows of ``qkv_proj`` are [score | k | v].

    It weighs keys by one score per point and multiplies every value by their sum. Channel i of k, of v and of
    the result are cut together, as v.
    """

    family = "attention"
    module_classes = (LinearSelfAttention,)

    def describe(self, name: str, module: Any) -> Layer:
        qkv, proj = Projection.of(module, "qkv_proj"), Projection.of(module, "out_proj")
        written, value = (*qkv.rows(1), *qkv.rows(1 + proj.reads)), qkv.hook("output", 1 + proj.reads)
        v = proj.unit(name, "v", (1, proj.reads), written, {"value": value})
        return Layer(name, self, (v,), channel_dim=1)

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        module.embed_dim = widths["v"]


class SlimLiteMLA(LiteMLA):  # type: ignore[misc]
    """Cut attention of EfficientViT: q/k and v may have different widths. Created by ``resize``."""

    num_heads: int
    """Heads per scale."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C_out, H, W]."""
        q, k, v = heads_of_all_scales(self, x)
        q, k, v = self.kernel_func(q), self.kernel_func(k), F.pad(v, (0, 1), value=1.0)
        device = "cpu" if v.is_meta else v.device.type  # there is no autocast for meta
        with torch.autocast(device_type=device, enabled=False):
            out = self._attn(q, k, v)
        return self.proj(out.mT.reshape(x.shape[0], -1, *x.shape[2:]))


def heads_of_all_scales(module: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Return q, k and v of a map [B, C, H, W], each [B, heads of all scales, N, d]."""
    heads, qk_width, v_width = _sizes(module)
    scales = [module.qkv(x)]
    for depthwise, pointwise in module.aggreg:
        scales.append(_within_parts(pointwise, depthwise(scales[0]), heads, qk_width, v_width))
    rows = torch.cat(scales, dim=1).flatten(2).unflatten(1, (-1, 2 * qk_width + v_width)).mT
    return rows.split([qk_width, qk_width, v_width], dim=-1)


def _within_parts(conv: Any, x: Tensor, heads: int, qk_width: int, v_width: int) -> Tensor:
    """Apply ``conv``, whose groups are q, k and v of each head, to a map [B, C, H, W]."""
    if qk_width == v_width:
        return conv(x)
    x, weight = x.unflatten(1, (heads, -1)), conv.weight.unflatten(0, (heads, -1))
    bias = None if conv.bias is None else conv.bias.unflatten(0, (heads, -1))
    parts = []
    for part, width in ((slice(2 * qk_width), qk_width), (slice(2 * qk_width, None), v_width)):
        rows = weight[:, part, :width]
        made = F.conv2d(
            x[:, :, part].flatten(1, 2),
            rows.flatten(0, 1),
            None if bias is None else bias[:, part].flatten(),
            groups=heads * rows.shape[1] // width,
        )
        parts.append(made.unflatten(1, (heads, -1)))
    return torch.cat(parts, dim=2).flatten(1, 2)


class MultiScaleAdapter(Adapter):
    """Linear attention at several scales: ``LiteMLA`` of EfficientViT (MIT).

    Every scale has heads of its own. ``qkv`` writes those of the first scale, q, k, v within every head; a
    depthwise convolution, and then one within the q, the k and the v of each head, make those of another
    scale of them. So a channel of the first scale feeds its own head and, with others, all channels of that
    head at the other scales. All heads keep the same number of channels, each its own. q and k pass a ReLU
    and v the depthwise convolution, so that channels are selected, never mixed. A factor on the rows of a
    channel scales everything that it feeds.
    """

    family = "attention"
    module_classes = (LiteMLA, SlimLiteMLA)

    def heads(self, module: Any) -> int:
        """Number of heads of all scales."""
        return _sizes(module)[0] * (1 + len(module.aggreg))

    def describe(self, name: str, module: Any) -> Layer:
        _, qk_width, v_width = _sizes(module)
        query, key, value = (_rows(module, offset) for offset in (0, qk_width, 2 * qk_width))
        qk = Unit(
            name,
            "qk",
            self.heads(module),
            qk_width,
            axes=query[0] + key[0],
            scale_axes=query[1] + key[1],
            hooks={"query": _hook(0, qk_width), "key": _hook(1, qk_width), "value": _hook(2, v_width)},
            linear=True,
            mixing="select",
        )
        size, hooks = (qk.heads, v_width), {"value": _hook(2, v_width)}
        more = {"scale_axes": value[1], "feeds": bool(module.aggreg)}
        v = Projection.of(module, "proj").unit(name, "v", size, value[0], hooks, **more)
        return Layer(name, self, (qk, v), channel_dim=1)

    def record_kept(self, module: Any, unit: Unit, kept: Tensor) -> None:
        """Move the weights that read kept channels of the first scale to the front; others become 0."""
        heads, qk_width, _ = _sizes(module)
        width = kept.shape[1]
        for _, pointwise in module.aggreg:
            weight = pointwise.weight.detach().unflatten(0, (heads, -1))
            index = kept[:heads, None, :, None, None].to(weight.device).expand(-1, unit.width, -1, 1, 1)
            for first in (0, qk_width) if unit.kind == "qk" else (2 * qk_width,):
                rows = weight[:, first : first + unit.width]
                chosen = rows.gather(2, index)
                rows.zero_()  # what lies behind the kept ones is not read
                rows[:, :, :width] = chosen

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        qk_width, v_width = widths["qk"], widths["v"]
        module.num_heads = Projection.of(module, "qkv").writes // (2 * qk_width + v_width)
        for _, conv in module.aggreg:
            weight = conv.weight.detach()[:, : max(qk_width, v_width)].contiguous()
            conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
            conv.in_channels = conv.out_channels
        module.dim = v_width
        module.__class__ = LiteMLA if qk_width == v_width else SlimLiteMLA


def _sizes(module: Any) -> tuple[int, int, int]:
    """Return heads per scale, q/k channels per head, and v channels per head."""
    qkv, proj = Projection.of(module, "qkv"), Projection.of(module, "proj")
    heads = module.num_heads if isinstance(module, SlimLiteMLA) else qkv.writes // (3 * module.dim)
    v_width = proj.reads // (heads * (1 + len(module.aggreg)))
    return heads, (qkv.writes // heads - v_width) // 2, v_width


def _rows(module: Any, offset: int) -> tuple[tuple[ChannelAxis, ...], tuple[ChannelAxis, ...]]:
    """Return the rows that write q, k or v, and the rows to scale.

    ``offset`` is the first row of the part within a head.
    """
    heads, qk_width, v_width = _sizes(module)
    place = offset, 2 * qk_width + v_width

    def of_scale(axes: tuple[ChannelAxis, ...], scale: int) -> list[ChannelAxis]:
        return [replace(axis, heads=(scale * heads, (scale + 1) * heads)) for axis in axes]

    qkv = Projection.of(module, "qkv")
    rows, scaled = of_scale(qkv.rows(*place), 0), of_scale(qkv.scaled_rows(*place), 0)
    for scale in range(len(module.aggreg)):
        depthwise, pointwise = (Projection.of(module, f"aggreg.{scale}.{part}") for part in (0, 1))
        passed, made = of_scale(depthwise.rows(*place), 0), of_scale(pointwise.rows(*place), scale + 1)
        rows += passed + made
        scaled += passed[1:] + made  # of the depthwise convolution the bias: its weight has a scaled input
    return tuple(rows), tuple(scaled)


def _hook(part: int, width: int) -> ActivationHook:
    """Return a hook on q, k or v of all scales, computed from the layer's input."""

    def features(module: Any, x: Tensor) -> Tensor:
        made = heads_of_all_scales(module, x)[part]
        return (module.kernel_func(made) if part < 2 else made).transpose(1, 2).flatten(2)

    return ActivationHook("", "input", width=width, then=features)


class SlimFactorAttention(FactorAttnConvRelPosEnc):  # type: ignore[misc]
    """Cut attention of CoaT, with any width. Created by ``resize``."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Map [B, 1 + H * W, C] to the same shape; ``size`` is (H, W)."""
        q, k, v = (by_head(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))  # (B, H, N, d)
        gathered = q @ (k.softmax(dim=2).mT @ v)
        return self.proj_drop(self.proj(merged(self.scale * gathered + self.crpe(q, v, size=size))))


class FactorAttentionAdapter(Adapter):
    """CoaT's factorised attention: q (softmax(k)^T v), and q times a depthwise convolution of v.

    Rows of ``qkv`` are [q | k | v], each head-major; each convolution has the v of several heads. Channel i
    of q multiplies row i of softmax(k)^T v, and the convolved channel i of v; so q, k and v keep the same
    channels. That row is added to all channels of the head: without channel i, more changes than the column
    of the projection that reads it. Layers of a stage share the convolutions; a layer that is cut gets its
    own, with the channels that it kept.
    """

    family = "attention"
    module_classes = (FactorAttnConvRelPosEnc, SlimFactorAttention)

    def describe(self, name: str, module: Any) -> Layer:
        qkv, proj, heads = Projection.of(module, "qkv"), Projection.of(module, "proj"), module.num_heads
        query, key, value = (qkv.rows(offset) for offset in (0, proj.reads, 2 * proj.reads))
        written, hooks = (
            query + key + value + _convolutions(module),
            {"value": qkv.hook("output", 2 * proj.reads)},
        )
        unit = proj.unit(name, "v", (heads, proj.reads // heads), written, hooks, feeds=True)
        unit = replace(unit, scale_axes=(*query, *unit.scale_axes))
        return Layer(name, self, (unit,), coupled_with={"qk": "v"})

    def record_kept(self, module: Any, unit: Unit, kept: Tensor) -> None:
        if kept.shape[1] < unit.width:
            module.crpe = copy.deepcopy(module.crpe)  # other layers of the stage keep all its channels

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        module.__class__ = SlimFactorAttention
        module.crpe.channel_splits = [split * widths["v"] for split in module.crpe.head_splits]

    def fix_shared_modules(self, model: nn.Module) -> None:
        """Point the model to the convolutions of the first layer that used the shared ones."""
        coats: list[Any] = [module for module in model.modules() if isinstance(module, CoaT)]
        for coat in coats:
            for stage in range(1, 5):
                layers = [block.factoratt_crpe for block in getattr(coat, f"serial_blocks{stage}") or ()]
                if stage > 1:
                    parallel = coat.parallel_blocks or ()
                    layers += [getattr(block, f"factoratt_crpe{stage}") for block in parallel]
                if layers:
                    setattr(coat, f"crpe{stage}", layers[0].crpe)


def _convolutions(module: Any) -> tuple[ChannelAxis, ...]:
    """Return the axes of the v channels in the convolutions."""
    axes: list[ChannelAxis] = []
    first = 0
    for number, split in enumerate(module.crpe.head_splits):
        rows = Projection.of(module, f"crpe.conv_list.{number}").rows()
        axes += [replace(axis, heads=(first, first + split)) for axis in rows]
        first += split
    return tuple(axes)


class LambdaAdapter(Adapter):
    """``LambdaLayer``: the queries of every head meet one matrix of keys and values.

    Rows of ``qkv`` are [q of every head | k | v]. A q/k channel is a row of that matrix, made of a key that
    is a softmax over positions and of a convolution of v, or a table of positions. It meets one channel of
    every head's queries: they are tied, and count as one head. Each key has a softmax of its own, so that
    channels are selected. timm's own forward takes any number of them. v is not prunable, because no
    projection reads it.
    """

    family = "attention"
    module_classes = (LambdaLayer,)

    def describe(self, name: str, module: Any) -> Layer:
        heads, width, qkv = module.num_heads, module.dim_qk, Projection.of(module, "qkv")
        copies = tuple(head * width for head in range(heads))
        query, *query_bias = (replace(axis, copies=copies) for axis in qkv.rows())
        query = replace(query, norm="norm_q")
        if module.conv_lambda is None:
            positions = [ChannelAxis("pos_emb", 2)]
        else:
            positions = [ChannelAxis(f"conv_lambda.{part}", 0) for part in ("weight", "bias")]
        qk = Unit(
            name,
            "qk",
            1,
            width,
            axes=(query, *query_bias, *qkv.rows(heads * width), *positions),
            scale_axes=(query,),
            hooks={
                # Each head is an observation: (B, height, width, H, d).
                "query": ActivationHook(
                    "norm_q", "output", then=lambda _, x: x.movedim(1, -1).unflatten(-1, (heads, -1))
                ),
                "key": replace(
                    qkv.hook("output", heads * width),
                    then=lambda _, x: x.flatten(2).softmax(dim=-1).view_as(x),
                ),
            },
            mixing="select",
        )
        return Layer(name, self, (qk,), {"v": NO_PROJECTION}, channel_dim=1)

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        module.dim_qk = widths["qk"]
        if module.conv_lambda is not None:
            module.conv_lambda.out_channels = widths["qk"]
