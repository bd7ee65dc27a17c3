"""Linear attention at several scales: ``LiteMLA`` of EfficientViT (MIT).

Every scale has heads of its own. ``qkv`` writes those of the first scale; a depthwise convolution, and then
one within the q, the k and the v of each head, make those of another scale of them. So a channel of the first
scale feeds its own head and, with others, all channels of that head at the other scales. All heads keep the
same number of channels, each its own. q and k pass a ReLU and v the depthwise convolution, so that channels
are selected, never mixed. A factor on the rows of a channel scales everything that it feeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.efficientvit_mit import LiteMLA
from torch import Tensor, nn

from mhacut.adapters.base import ActivationHook, Adapter, ChannelAxis, Layer, Unit
from mhacut.adapters.projection import Projection
from mhacut.plan import UnitKind


class SlimLiteMLA(LiteMLA):  # type: ignore[misc]
    """EfficientViT's attention, with q/k wider or narrower than v. Made by ``resize``, never constructed.

    One weight holds the convolutions within q, k and v, which read as many channels as they write. It has
    room for the widest; what the others do not need is zero and not read.
    """

    num_heads: int
    """Heads of one scale."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C_out, H, W]."""
        q, k, v = heads_of_all_scales(self, x)
        q, k, v = self.kernel_func(q), self.kernel_func(k), F.pad(v, (0, 1), value=1.0)
        device = "cpu" if v.is_meta else v.device.type  # there is no autocast for meta
        with torch.autocast(device_type=device, enabled=False):
            out = self._attn(q, k, v)
        return self.proj(out.mT.reshape(x.shape[0], -1, *x.shape[2:]))


def heads_of_all_scales(module: Any, x: Tensor) -> tuple[Tensor, ...]:
    """q, k and v, each [B, heads of all scales, N, d], of [B, C, H, W]."""
    heads, qk_width, v_width = _sizes(module)
    scales = [module.qkv(x)]
    for depthwise, pointwise in module.aggreg:
        scales.append(_within_parts(pointwise, depthwise(scales[0]), heads, qk_width, v_width))
    rows = torch.cat(scales, dim=1).flatten(2).unflatten(1, (-1, 2 * qk_width + v_width)).mT
    return rows.split([qk_width, qk_width, v_width], dim=-1)


def _within_parts(conv: Any, x: Tensor, heads: int, qk_width: int, v_width: int) -> Tensor:
    """``conv`` of [B, C, H, W], whose groups are the q, the k and the v of each head."""
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
    """Rows of ``qkv``, and of what makes the other scales of it, are q, k, v within every head."""

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

    def keep(self, module: Any, unit: Unit, kept: Tensor) -> None:
        """Move the weights that read kept channels of the first scale to the front; zero the others."""
        heads, qk_width, _ = _sizes(module)
        width = kept.shape[1]
        for _, pointwise in module.aggreg:
            weight = pointwise.weight.detach().unflatten(0, (heads, -1))
            index = kept[:heads, None, :, None, None].to(weight.device).expand(-1, unit.width, -1, 1, 1)
            for first in (0, qk_width) if unit.kind == "qk" else (2 * qk_width,):
                rows = weight[:, first : first + unit.width]
                chosen = rows.gather(2, index)
                rows.zero_()
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
    """Heads of one scale, channels of each for q and k, and for v."""
    qkv, proj = Projection.of(module, "qkv"), Projection.of(module, "proj")
    heads = module.num_heads if isinstance(module, SlimLiteMLA) else qkv.writes // (3 * module.dim)
    v_width = proj.reads // (heads * (1 + len(module.aggreg)))
    return heads, (qkv.writes // heads - v_width) // 2, v_width


def _rows(module: Any, offset: int) -> tuple[tuple[ChannelAxis, ...], tuple[ChannelAxis, ...]]:
    """Rows that make q, k or v, which begin at ``offset`` of a head; and those that a factor scales."""
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
        scaled += passed[1:] + made  # of the depthwise convolution the bias; its weight has scaled input
    return tuple(rows), tuple(scaled)


def _hook(part: int, width: int) -> ActivationHook:
    """Hook on q, k or v of all scales: no module outputs it, so it is computed from the layer's input."""

    def features(module: Any, x: Tensor) -> Tensor:
        made = heads_of_all_scales(module, x)[part]
        return (module.kernel_func(made) if part < 2 else made).transpose(1, 2).flatten(2)

    return ActivationHook("", "input", width=width, then=features)
