"""Focused linear attention of the FLatten Transformers (Han et al., ICCV 2023, arXiv 2308.00442).

Letters: B images, N tokens of a map of H x W, h heads, C channels (head-major: channel = head * d +
position). With phi the focusing of :func:`focus`, a head gives

    out_i = phi(q_i) . (1/N sum_j phi(k_j) v_j^T) / (phi(q_i) . 1/N sum_j phi(k_j) + 1e-6)  +  dwc(v)_i

so keys are multiplied by values first: the cost is N * d * d per head, not N * N * d. ``dwc`` is one
depthwise convolution of d filters that all heads share; it restores the rank that linear attention lacks
(paper, section 4.2).

Widths are read from the parameters: q/k may have another number of channels per head than v, as long as every
head of a layer has the same; and ``dwc`` may have a separate filter for every channel of every head.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, trunc_normal_
from timm.layers.trace_utils import _assert
from torch import Tensor, nn
from torch.nn import functional as F

from mhacut.errors import UsageError

Grid = tuple[int, int]
"""Height and width of a token map, in tokens."""

EPSILON = 1e-6
"""Constant added to q and k after the ReLU, so that no norm is 0, and to the denominator of the attention."""
FOCUSING_FACTOR = 3
"""Default power p of the focusing function (paper, equation 5)."""
DWC_KERNEL = 5
"""Default kernel size of the depthwise convolution, in tokens."""


def focus(tokens: Tensor, scale: Tensor, power: int = FOCUSING_FACTOR, gate: Tensor | None = None) -> Tensor:
    """Return the focused feature map of q or k, [B, N, C] (paper, equations 5 and 6).

    The result is t^power * ||t|| / ||t^power|| for t = (relu(x) + 1e-6) / softplus(scale), with norms over
    the channels of all heads. ``tokens`` are at least float32, since (1e-6)^3 is 0 in half precision.
    ``scale`` is [1, 1, C].
    """
    # The gate [C], at least 0, is a factor on each channel's product of q and k. It changes only the norms
    # here, as if q and k each had a factor of gate^(1/2p) before the power. The caller multiplies q or k by
    # the gate. A gate of 0 removes the channel exactly, and its gradient does not vanish at 0. A factor
    # before the + 1e-6 could do neither.
    features = (F.relu(tokens) + EPSILON) / F.softplus(scale)
    sharpened = features**power
    if gate is None:
        length = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
        size = torch.linalg.vector_norm(sharpened, dim=-1, keepdim=True)
    else:
        length = torch.linalg.vector_norm(features * _factor(gate, power), dim=-1, keepdim=True)
        size = (sharpened.square() * _opening(gate)).sum(-1, keepdim=True).sqrt()
    return sharpened * (length / size)


def scale_with_gate(scale: Tensor, gate: Tensor, power: int = FOCUSING_FACTOR) -> Tensor:
    """Return a scale, [1, 1, C], with which :func:`focus` gives the same features without the gate.

    Channels with a gate of 0 keep their scale, because no finite scale replaces a gate of 0.
    """
    # softplus(wanted) = softplus(scale) / gate^(1/2p), solved for wanted: log(exp(size) - 1), written stably.
    size = F.softplus(scale) / _factor(gate, power)
    wanted = torch.where(
        size > 20, size, size + torch.log(-torch.expm1(-size))
    )  # torch's softplus(x) is x above 20
    return torch.where((gate <= 0) | (gate == 1), scale, wanted)


def _opening(gate: Tensor) -> Tensor:
    """Return ``gate`` clamped at 0, with gradient 1 at 0, so that training can raise a gate of 0."""
    # The gradient of clamp_min at its bound differs between versions of torch.
    return torch.where(gate >= 0, gate, 0.0)


def _factor(gate: Tensor, power: int) -> Tensor:
    """Return gate^(1 / (2 * power)), with value 0 and gradient 0 where the gate is 0 or negative."""
    tiny = torch.finfo(gate.dtype).tiny
    return torch.where(gate > 0, gate.clamp_min(tiny) ** (0.5 / power), 0.0)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return linear attention of non-negative features q and k, [B, h, N, d_v].

    Keys multiply values first.
    """
    # Means over keys, above and below: only the epsilon then depends on the number of tokens.
    normaliser: Tensor = 1 / (q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + EPSILON)  # (B, h, N, 1)
    # 1 / N in two halves, as in the official code.
    root = k.shape[-2] ** -0.5
    keys_values = (k.transpose(-2, -1) * root) @ (v * root)  # (B, h, d_qk, d_v)
    return (q @ keys_values) * normaliser


def convolve_channels(v: Tensor, conv: nn.Conv2d, grid: Grid) -> Tensor:
    """Apply a depthwise convolution to the map of each channel, [B, N, C_v].

    All heads share the filters if there are as many filters as channels per head.
    """
    batch, tokens, channels = v.shape
    sharing = channels // conv.out_channels  # heads for shared filters, 1 for one filter per channel
    maps = v.reshape(batch, *grid, sharing, conv.out_channels).permute(0, 3, 4, 1, 2)
    local: Tensor = conv(maps.flatten(0, 1)).unflatten(0, (batch, sharing))  # (B, h, d_v, H, W)
    return local.permute(0, 3, 4, 1, 2).reshape(batch, tokens, channels)


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    return tokens.reshape(*tokens.shape[:2], num_heads, -1).transpose(1, 2)


def merge_heads(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)


class FocusedLinearAttention(nn.Module):
    """Base class of focused linear attention.

    A subclass names its projections and applies them around :meth:`attend`. Parameters have the official
    names and order.
    """

    projections: Mapping[str, int]
    """Names of the linear layers, each with its number of outputs as a multiple of ``dim``."""
    scale: nn.Parameter
    """Scale of q and k channels before its softplus, [1, 1, C_qk]."""
    positional_encoding: nn.Parameter
    """Encoding added to k before the ReLU, [1, N, C_qk]."""
    dwc: nn.Conv2d
    """Depthwise convolution of v. It has d_v filters if all heads share them, else heads * d_v."""
    feature_gate: Tensor | None
    """Scale per q/k channel in a masked model, [C_qk]; None in any other model."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: Grid,
        *,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        focusing_factor: int = FOCUSING_FACTOR,
        kernel_size: int = DWC_KERNEL,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{dim} channels cannot be divided equally among {num_heads} heads")
        dd, width, tokens = {"device": device, "dtype": dtype}, dim // num_heads, grid_size[0] * grid_size[1]
        self.num_heads, self.grid_size, self.focusing_factor = num_heads, grid_size, focusing_factor
        self.scale = nn.Parameter(torch.zeros(1, 1, dim, **dd))
        self.positional_encoding = nn.Parameter(torch.zeros(1, tokens, dim, **dd))
        self.register_buffer("feature_gate", None, persistent=False)
        # For activation hooks on the features, (B, N, C_qk)
        self.query_features, self.key_features = nn.Identity(), nn.Identity()
        for name, times in self.projections.items():
            setattr(self, name, nn.Linear(dim, times * dim, bias=qkv_bias or name == "proj", **dd))
        # Parameters are made in the official order, in which optimizers' states list them.
        self.add_convolutions(dim, **dd)
        self.dwc = nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        for name in self.projections:
            init_linear(getattr(self, name))

    def add_convolutions(self, dim: int, device: Any, dtype: Any) -> None:
        return

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the sum of linear attention and depthwise convolution of v, [B, N, C_v].

        It is computed in float32 or float64, and returned in the dtype of ``v``.
        """
        precise = torch.promote_types(v.dtype, torch.float32)
        with _no_autocast(v.device.type):
            scale, gate = self.scale.to(precise), self.feature_gate
            gate = None if gate is None else gate.to(precise)
            query = focus(q.to(precise), scale, self.focusing_factor, gate)
            key = focus(k.to(precise) + self.positional_encoding, scale, self.focusing_factor, gate)
            query = self.query_features(query if gate is None else query * _opening(gate))
            key = self.key_features(key)
            heads = linear_attention(
                *(split_heads(tokens, self.num_heads) for tokens in (query, key, v.to(precise)))
            )
        return merge_heads(heads).to(v.dtype) + convolve_channels(v, self.dwc, self.grid_size)

    def set_grid_size(self, grid_size: Grid) -> None:
        if grid_size != self.grid_size:
            resized = resample_abs_pos_embed(
                self.positional_encoding.detach(), grid_size, self.grid_size, num_prefix_tokens=0
            )
            self.positional_encoding = nn.Parameter(
                resized, requires_grad=self.positional_encoding.requires_grad
            )
            self.grid_size = grid_size

    def extra_repr(self) -> str:
        height, width = self.grid_size
        return (
            f"num_heads={self.num_heads}, grid_size={height}x{width}, focusing_factor={self.focusing_factor}"
        )


class FusedFocusedAttention(FocusedLinearAttention):
    """Focused linear attention with 1 projection ``qkv`` of rows [q | k | v] (FLatten-Swin, -DeiT)."""

    projections: Mapping[str, int] = {"qkv": 3, "proj": 1}
    qkv: nn.Linear
    proj: nn.Linear

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map tokens [B, N, C] to [B, N, C]. An attention mask is an error."""
        if attn_mask is not None or is_causal:
            raise UsageError("focused linear attention does not support attention masks")
        q, k, v = split_qkv(self.qkv(x), self.proj.in_features)
        return self.proj_drop(self.proj(self.attend(q, k, v)))


class SeparateFocusedAttention(FocusedLinearAttention):
    """Focused linear attention with projections ``q`` and ``kv`` of rows [k | v], as in FLatten-PVT."""

    projections: Mapping[str, int] = {"q": 1, "kv": 2, "proj": 1}
    q: nn.Linear
    kv: nn.Linear
    proj: nn.Linear

    def forward(self, x: Tensor, feat_size: Any = None) -> Tensor:
        """Map tokens [B, N, C] to [B, N, C]; ``feat_size`` is the height and width of the map."""
        if feat_size is not None:
            height, width = self.grid_size
            _assert(
                (feat_size[0], feat_size[1]) == (height, width),
                f"a map of {feat_size[0]}x{feat_size[1]} tokens, expected {height}x{width}: the positional "
                "encoding fixes the size of the images; build the model for this size with img_size=",
            )
        q, kv = self.q(x), self.kv(x)
        k, v = kv.split((kv.shape[-1] - self.proj.in_features, self.proj.in_features), dim=-1)
        return self.proj_drop(self.proj(self.attend(q, k, v)))


class FocusedBlock(nn.Module):
    """Transformer block x + attn(norm1(x)), then x + mlp(norm2(x)), of FLatten-PVT, Swin and CSWin."""

    def __init__(
        self, norm1: nn.Module, attn: nn.Module, norm2: nn.Module, mlp: nn.Module, drop_path: nn.Module
    ) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = norm1, attn, norm2, mlp
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def split_qkv(qkv: Tensor, v_channels: int) -> tuple[Tensor, Tensor, Tensor]:
    qk_channels = (qkv.shape[-1] - v_channels) // 2
    q, k, v = torch.split(qkv, [qk_channels, qk_channels, v_channels], dim=-1)
    return q, k, v


def init_linear(linear: nn.Linear) -> None:
    """Initialise a linear layer: weight from a truncated normal of standard deviation 0.02, bias 0."""
    trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
