"""Softmax attention whose projection holds q, k and v within every head.

MaxViT's and CoAtNet's (also with q, k and v over all heads), LeViT's, EfficientFormer's, TinyViT's, and
that of LowFormer and CPUBone on a coarser map.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models import cpubone, efficientformer, levit, lowformer, maxxvit, tiny_vit
from torch import Tensor, device, nn

from mhacut.adapters.rows import Projection
from mhacut.adapters.softmax import (
    Layout,
    Rows,
    SoftmaxAdapter,
    as_map,
    as_tokens,
    attend_in,
    per_head,
    split_heads,
)


class _SlimMaxxVit:
    """What both of MaxViT's share. Mixed into timm's classes by ``resize``, never constructed."""

    def attend_tokens(self, qkv: Tensor, shared_rel_pos: Tensor | None) -> Tensor:
        """[B, N, H * (2 d_qk + d_v)] to [B, N, H * d_v]."""
        module: Any = self
        v_dim = Projection.of(module, "proj").reads
        bias = shared_rel_pos if module.rel_pos is None else module.rel_pos.get_bias()
        q, k, v = split_heads(qkv, module.num_heads, v_dim, head_first=module.head_first)
        return attend_in(module, q, k, v, bias)


class SlimAttentionCl(_SlimMaxxVit, maxxvit.AttentionCl):  # type: ignore[misc]
    """MaxViT's on channels-last maps, with other widths for q/k than for v."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """[B, ..., C] to [B, ..., C_out]."""
        out = self.attend_tokens(self.qkv(x).flatten(1, -2), shared_rel_pos)
        projected: Tensor = self.proj_drop(self.proj(out.reshape(*x.shape[:-1], -1)))
        return projected


class SlimAttention2d(_SlimMaxxVit, maxxvit.Attention2d):  # type: ignore[misc]
    """MaxViT's on maps, with other widths for q/k than for v."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """[B, C, H, W] to [B, C_out, H, W]."""
        out = as_map(self.attend_tokens(as_tokens(self.qkv(x)), shared_rel_pos), x.shape[2:])
        projected: Tensor = self.proj_drop(self.proj(out))
        return projected


class MaxxVitAdapter(SoftmaxAdapter):
    """One ``qkv``, linear layer or 1x1 convolution; rows [q | k | v] within every head or over all heads."""

    def __init__(self, dense: type[Any], slim: type[Any]) -> None:
        """Serve ``dense``, as ``slim`` where q/k and v differ in width."""
        self.module_classes = (dense, slim)
        self.dense, self.slim = dense, slim

    def layout(self, module: Any) -> Layout:
        heads, v_dim = module.num_heads, Projection.of(module, "proj").reads
        qk_dim = (Projection.of(module, "qkv").writes - v_dim) // 2
        if module.head_first:
            places = per_head("qkv", qk_dim // heads, v_dim // heads)
        else:
            places = Rows("qkv"), Rows("qkv", qk_dim), Rows("qkv", 2 * qk_dim)
        return Layout(heads, qk_dim // heads, v_dim // heads, *places)

    def tokens(self, module: Any, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
        tokens = 1
        for size in input_shape[1:]:
            tokens *= size
        tokens //= Projection.of(module, "qkv").reads
        return input_shape[0], tokens, tokens

    def retell(self, module: Any, qk_width: int, v_width: int) -> None:
        module.__class__ = self.dense if qk_width == v_width else self.slim
        module.dim_head = v_width


class FreshBiases:
    """timm's, but biases of positions are gathered anew in every call.

    timm keeps them from one call in eval mode to the next, with the graph that made them: a second backward
    pass in eval mode, as tuning takes it, fails on that, or would see the biases of the first.
    """

    def get_attention_biases(self, device: device) -> Tensor:
        module: Any = self
        biases: Tensor = module.attention_biases[:, module.attention_bias_idxs]
        return biases

    def train(self, mode: bool = True) -> nn.Module:
        """As of any module; timm's gives nothing back."""
        module: Any = self
        nn.Module.train(module, mode)
        same: nn.Module = module
        return same


class SlimLevitAttention(FreshBiases, levit.Attention):  # type: ignore[misc]
    """LeViT's, cut. Made by ``resize``, never constructed, as those below."""


class SlimLevitDownsample(FreshBiases, levit.AttentionDownsample):  # type: ignore[misc]
    """LeViT's between stages, cut."""


class SlimEfficientFormerAttention(FreshBiases, efficientformer.Attention):  # type: ignore[misc]
    """EfficientFormer's, cut."""


class SlimTinyVitAttention(FreshBiases, tiny_vit.Attention):  # type: ignore[misc]
    """TinyViT's, cut."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] to [B, N, C]; timm's, but for the kernel where q/k and v differ in width."""
        v_dim = self.proj.in_features
        q, k, v = split_heads(self.qkv(self.norm(x)), self.num_heads, v_dim, head_first=True)
        projected: Tensor = self.proj(attend_in(self, q, k, v, self.get_attention_biases(x.device)))
        return projected


class KeyDimAdapter(SoftmaxAdapter):
    """Classes with ``key_dim`` and ``val_dim``, whose own forward takes any."""

    def __init__(
        self, dense: type[Any], slim: type[Any], *, output_projection: str = "proj", acts: bool = False
    ) -> None:
        """Serve ``dense``, as ``slim`` once cut; ``acts``: there is an activation before it."""
        self.module_classes = (dense, slim)
        self.slim, self.output_projection, self.acts = slim, output_projection, acts

    def layout(self, module: Any) -> Layout:
        qk_width, v_width = module.key_dim, module.val_dim
        query, key, value = per_head("qkv", qk_width, v_width)
        if hasattr(module, "kv"):
            stride = qk_width + v_width
            query, key, value = Rows("q.ln"), Rows("kv", 0, stride), Rows("kv", qk_width, stride)
        return Layout(
            module.num_heads,
            qk_width,
            v_width,
            query,
            key,
            value,
            self.output_projection,
            v_rotatable=not self.acts,
        )

    def tokens(self, module: Any, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
        queries, keys = module.attention_bias_idxs.shape
        return input_shape[0], queries, keys

    def retell(self, module: Any, qk_width: int, v_width: int) -> None:
        module.__class__ = self.slim
        module.key_dim, module.val_dim = qk_width, v_width
        module.key_attn_dim = qk_width * module.num_heads
        module.val_attn_dim = module.out_dim = v_width * module.num_heads


class _Coarse:
    """LowFormer's forward at any widths. Mixed into timm's classes by ``resize``, never constructed."""

    def padded(self, x: Tensor) -> Tensor:
        """The map that is made coarser."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        module: Any = self
        coarse = module.pwise(module.conv_proj(self.padded(x)))
        q, k, v = split_heads(as_tokens(coarse), module.num_heads, module.o_proj_inpdim, head_first=True)
        out = as_map(attend_in(module, q, k, v), coarse.shape[2:])
        fine: Tensor = module.upsampling(module.o_proj(out))
        return fine[..., : x.shape[2], : x.shape[3]]


class SlimLowFormerAttention(_Coarse, lowformer.ConvAttention):  # type: ignore[misc]
    """LowFormer's, with other widths for q/k than for v."""


class SlimCpuBoneAttention(_Coarse, cpubone.ConvAttention):  # type: ignore[misc]
    """CPUBone's, with other widths for q/k than for v."""

    def padded(self, x: Tensor) -> Tensor:
        if not self.small_kernels:
            return x
        height, width = x.shape[2:]
        return F.pad(x, (0, (-width) % self.att_stride, 0, (-height) % self.att_stride))


class CoarseAdapter(SoftmaxAdapter):
    """Attention on a map that a strided depthwise convolution has made; ``pwise`` holds q, k, v per head."""

    def __init__(self, dense: type[Any], slim: type[Any]) -> None:
        """Serve ``dense``, as ``slim`` where q/k and v differ in width."""
        self.module_classes = (dense, slim)
        self.dense, self.slim = dense, slim

    def layout(self, module: Any) -> Layout:
        heads = module.num_heads
        v_width = module.o_proj_inpdim // heads
        qk_width = (module.pwise.out_channels // heads - v_width) // 2
        return Layout(
            heads,
            qk_width,
            v_width,
            *per_head("pwise", qk_width, v_width),
            _coarse_readout(module),
        )

    def tokens(self, module: Any, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
        conv, tokens = module.conv_proj.conv, 1
        if isinstance(conv, nn.Sequential):  # padded by hand, so that the map keeps its size
            return input_shape[0], input_shape[2] * input_shape[3], input_shape[2] * input_shape[3]
        for axis, size in enumerate(input_shape[2:]):
            if getattr(module, "small_kernels", False):
                size += -size % module.att_stride
            padding, kernel, stride = conv.padding[axis], conv.kernel_size[axis], conv.stride[axis]
            tokens *= (size + 2 * padding - kernel) // stride + 1
        return input_shape[0], tokens, tokens

    def retell(self, module: Any, qk_width: int, v_width: int) -> None:
        module.__class__ = self.dense if qk_width == v_width else self.slim
        module.head_dim, module.o_proj_inpdim = qk_width, v_width * module.num_heads


def _coarse_readout(module: Any) -> str:
    """What reads v: point by point, or a transposed convolution that makes the map larger too."""
    if isinstance(module.o_proj, nn.Conv2d):
        return "o_proj"
    return "upsampling.0" if isinstance(module.upsampling, nn.Sequential) else "upsampling"


PER_HEAD = (
    MaxxVitAdapter(maxxvit.AttentionCl, SlimAttentionCl),
    MaxxVitAdapter(maxxvit.Attention2d, SlimAttention2d),
    KeyDimAdapter(levit.Attention, SlimLevitAttention, output_projection="proj.ln", acts=True),
    KeyDimAdapter(levit.AttentionDownsample, SlimLevitDownsample, output_projection="proj.ln", acts=True),
    KeyDimAdapter(efficientformer.Attention, SlimEfficientFormerAttention),
    KeyDimAdapter(tiny_vit.Attention, SlimTinyVitAttention),
    CoarseAdapter(lowformer.ConvAttention, SlimLowFormerAttention),
    CoarseAdapter(cpubone.ConvAttention, SlimCpuBoneAttention),
)
