"""Adapters of attention classes whose cost is linear in the number of tokens."""

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
    """Additive attention of SwiftFormer: each key is multiplied by a weighted sum of all queries.

    Channel i of q, of k and of the projection of their products is cut together as a qk channel, because the
    3 are multiplied or added elementwise. There is no v. q and k have unit length over all channels, so a
    channel is removed exactly only if it is zero in q and k and the projection does not read it.
    """

    family = "attention"
    module_classes = (EfficientAdditiveAttention,)

    def heads(self, module: Any) -> int:
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
    """Separable attention of MobileViTv2, with the ``qkv_proj`` rows [score | k | v].

    The sum of all keys, weighted by 1 score per point, multiplies every value. Channel i of k, of v and of
    the output is cut together as a v channel.
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
    """Linear attention of EfficientViT (MIT) after a cut. The widths of q/k and v may differ."""

    num_heads: int
    """Number of heads at each scale."""

    def forward(self, x: Tensor) -> Tensor:
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

    ``qkv`` writes the heads of the first scale. For each other scale, a depthwise convolution and a
    convolution within q, k or v of each head compute further heads from these channels. A factor on the rows
    of a first-scale channel therefore scales all channels that it feeds. All heads keep the same number of
    channels. Channels are selected, not mixed, because q and k pass a ReLU and v a depthwise convolution.
    """

    family = "attention"
    module_classes = (LiteMLA, SlimLiteMLA)

    def heads(self, module: Any) -> int:
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
        """Move convolution weights of kept channels to the front; set weights of removed ones to 0."""
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
    qkv, proj = Projection.of(module, "qkv"), Projection.of(module, "proj")
    heads = module.num_heads if isinstance(module, SlimLiteMLA) else qkv.writes // (3 * module.dim)
    v_width = proj.reads // (heads * (1 + len(module.aggreg)))
    return heads, (qkv.writes // heads - v_width) // 2, v_width


def _rows(module: Any, offset: int) -> tuple[tuple[ChannelAxis, ...], tuple[ChannelAxis, ...]]:
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
    def features(module: Any, x: Tensor) -> Tensor:
        made = heads_of_all_scales(module, x)[part]
        return (module.kernel_func(made) if part < 2 else made).transpose(1, 2).flatten(2)

    return ActivationHook("", "input", width=width, then=features)


class SlimFactorAttention(FactorAttnConvRelPosEnc):  # type: ignore[misc]
    """Factorised attention of CoaT after a cut."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Map tokens [B, 1 + H * W, C], the class token first, to the same shape; ``size`` is (H, W)."""
        q, k, v = (by_head(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))  # (B, H, N, d)
        gathered = q @ (k.softmax(dim=2).mT @ v)
        return self.proj_drop(self.proj(merged(self.scale * gathered + self.crpe(q, v, size=size))))


class FactorAttentionAdapter(Adapter):
    """Factorised attention of CoaT: q (softmax(k)^T v) plus q times a depthwise convolution of v.

    Rows of ``qkv`` are [q | k | v], each ordered by head. q, k and v of a head keep the same channels,
    because channel i of q multiplies row i of softmax(k)^T v and the convolved channel i of v. Layers of a
    stage share the convolutions, and a cut layer gets its own copy.
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
        """Replace the convolutions shared by a stage with those of the first layer that used them."""
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
    axes: list[ChannelAxis] = []
    first = 0
    for number, split in enumerate(module.crpe.head_splits):
        rows = Projection.of(module, f"crpe.conv_list.{number}").rows()
        axes += [replace(axis, heads=(first, first + split)) for axis in rows]
        first += split
    return tuple(axes)


class LambdaAdapter(Adapter):
    """``LambdaLayer``: the queries of all heads multiply one matrix of keys and values.

    Rows of ``qkv`` are [q of every head | k | v]. Row i of this matrix multiplies q channel i of every head,
    so q/k channels of all heads are cut together, as 1 head. Each key channel has its own softmax over
    positions, so channels are selected, not mixed. v is not prunable, because no projection reads v.
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
