"""FLatten-CSWin: CSWin with focused linear attention over the whole map in stages 1 and 2 (arXiv 2308.00442).

Stages 3 and 4 are those of CSWin (Dong et al., CVPR 2022, arXiv 2107.00652): in stage 3 one half of the
channels attends within vertical stripes of the map, the other half within horizontal ones; in stage 4 all
channels attend over the whole map.
Every branch adds LePE: a depthwise 3x3 convolution ``get_v`` of the values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, to_2tuple, use_fused_attn
from timm.layers.trace_utils import _assert
from torch import Tensor, nn
from torch.nn import functional as F

from mhacut.errors import UsageError
from mhacut.flatten.attention import (
    DWC_KERNEL,
    FOCUSING_FACTOR,
    FocusedBlock,
    FocusedLinearAttention,
    Grid,
    convolve_channels,
    init_linear,
    merge_heads,
    split_heads,
    split_qkv,
)
from mhacut.flatten.family import configs, register, resize_encodings, unwrap
from mhacut.flatten.pyramid import Pyramid, make_head


class FocusedLepeAttention(FocusedLinearAttention):
    """Focused linear attention over the whole map plus LePE, without q, k, v and output projections."""

    projections: Mapping[str, int] = {}

    def add_convolutions(self, dim: int, device: Any, dtype: Any) -> None:
        self.get_v = _lepe(dim, device, dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v) + convolve_channels(v, self.get_v, self.grid_size)


class StripeAttention(nn.Module):
    """Softmax attention within stripes of the map, plus LePE within each stripe."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: Grid,
        stripe: Grid,
        *,
        attn_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.grid_size, self.stripe = num_heads, grid_size, stripe
        self.scale = (dim // num_heads) ** -0.5
        self.fused_attn = use_fused_attn()
        self.get_v = _lepe(dim, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (self._to_stripes(tokens) for tokens in (q, k, v))  # (B * stripes, tokens, C)
        lepe = convolve_channels(v, self.get_v, self.stripe)
        q, k, v = (split_heads(tokens, self.num_heads) for tokens in (q, k, v))
        out = self.attend_within(q, k, v)
        return self._from_stripes(merge_heads(out) + lepe)

    def attend_within(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the softmax attention within each stripe, [B * stripes, h, tokens, d]."""
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        weights: Tensor = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.attn_drop(weights) @ v

    def _to_stripes(self, tokens: Tensor) -> Tensor:
        (height, width), (high, wide) = self.grid_size, self.stripe
        tiles = tokens.reshape(tokens.shape[0], height // high, high, width // wide, wide, tokens.shape[-1])
        return tiles.transpose(2, 3).flatten(0, 2).flatten(1, 2)  # (B * stripes, tokens, C)

    def _from_stripes(self, tokens: Tensor) -> Tensor:
        (height, width), (high, wide) = self.grid_size, self.stripe
        tiles = tokens.reshape(-1, height // high, width // wide, high, wide, tokens.shape[-1])
        return tiles.transpose(2, 3).flatten(1, 4)  # (B, N, C)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, grid_size={self.grid_size}, stripe={self.stripe}"


Branch = FocusedLepeAttention | StripeAttention


class CswinAttention(nn.Module):
    """Attention of FLatten-CSWin: input and output projections around branches.

    Branch b of ``attns`` processes the b-th part of the heads.
    """

    def __init__(
        self,
        dim: int,
        attns: Sequence[Branch],
        *,
        qkv_bias: bool,
        proj_drop: float,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_heads = sum(attn.num_heads for attn in attns)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.attns = nn.ModuleList(attns)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        qkv = split_qkv(self.qkv(x), self.proj.in_features)
        branches = zip(*(part.chunk(len(self.attns), dim=-1) for part in qkv), strict=True)
        attended = [attn(q, k, v) for attn, (q, k, v) in zip(self.attns, branches, strict=True)]
        return self.proj_drop(self.proj(torch.cat(attended, dim=-1)))


def stripe_branches(
    dim: int, num_heads: int, grid: Grid, *, split_size: int | None, **kwargs: Any
) -> list[Branch]:
    """Return the softmax branches of a block: vertical and horizontal stripes, or 1 full window."""
    height, width = grid
    # As in the official code: stripes as large as the map are one branch, with all channels.
    if split_size is None or grid == (split_size, split_size):
        return [StripeAttention(dim, num_heads, grid, grid, **kwargs)]
    if split_size < 1 or height % split_size or width % split_size:
        raise UsageError(
            f"split_size {split_size}: stripes of this width do not tile a map of {height}x{width} tokens; "
            "give an img_size or a split_size that fits"
        )
    return [
        StripeAttention(dim // 2, num_heads // 2, grid, stripe, **kwargs)
        for stripe in ((height, split_size), (split_size, width))
    ]


def _lepe(dim: int, device: Any = None, dtype: Any = None) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)


class ConvStem(nn.Sequential):
    """Patch embedding of CSWin: a 7x7 convolution of stride 4 and a norm, from images to maps [B, H, W, C].

    It has the attributes of timm's PatchEmbed for the image size.
    """

    def __init__(
        self, img_size: Grid, in_chans: int, dim: int, device: Any = None, dtype: Any = None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            nn.Conv2d(in_chans, dim, 7, stride=4, padding=2, **dd), ToChannelsLast(), nn.LayerNorm(dim, **dd)
        )
        self.img_size = img_size
        self.grid_size = ((img_size[0] - 3) // 4 + 1, (img_size[1] - 3) // 4 + 1)
        self.strict_img_size = True  # as timm's PatchEmbed: other sizes are refused in forward

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.img_size
        _assert(x.shape[-2] == height, f"Input height ({x.shape[-2]}) doesn't match model ({height}).")
        _assert(x.shape[-1] == width, f"Input width ({x.shape[-1]}) doesn't match model ({width}).")
        conv, to_channels_last, norm = self
        return norm(to_channels_last(conv(x)))


class ToChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class MergeBlock(nn.Module):
    """Downsampling between stages: a 3x3 convolution of stride 2, then a norm, on maps [B, H, W, C]."""

    def __init__(self, dim: int, out_dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(out_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class FlattenCswin(Pyramid):
    """FLatten-CSWin, with focused linear attention in the stages marked ``L`` in ``attn_type``."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        split_size: int = 7,
        attn_type: str = "LLSS",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        focusing_factor: int = FOCUSING_FACTOR,
        kernel_size: int = DWC_KERNEL,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        if len(attn_type) != len(depths) or set(attn_type) - {"L", "S"}:
            raise UsageError(f"attn_type {attn_type!r}: expected L or S for each of {len(depths)} stages")
        dims = [embed_dim * 2**index for index in range(len(depths))]
        super().__init__(dims, **kwargs)
        dd = {"device": device, "dtype": dtype}
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stage1_conv_embed = ConvStem(to_2tuple(img_size), self.in_chans, embed_dim, **dd)
        grid: Grid = self.stage1_conv_embed.grid_size
        for index, (dim, heads, kind) in enumerate(zip(dims, num_heads, attn_type, strict=True)):
            if index:
                setattr(self, f"merge{index}", MergeBlock(dims[index - 1], dim, **dd))
                grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
            blocks = []
            for rate in drop_paths[index]:
                branches: Sequence[Branch]
                if kind == "L":
                    linear = {"focusing_factor": focusing_factor, "kernel_size": kernel_size, **dd}
                    branches = [FocusedLepeAttention(dim, heads, grid, **linear)]
                else:
                    width = None if index == len(dims) - 1 else split_size
                    branches = stripe_branches(
                        dim, heads, grid, split_size=width, attn_drop=attn_drop_rate, **dd
                    )
                blocks.append(
                    FocusedBlock(
                        norm1=nn.LayerNorm(dim, **dd),
                        attn=CswinAttention(dim, branches, qkv_bias=qkv_bias, proj_drop=proj_drop_rate, **dd),
                        norm2=nn.LayerNorm(dim, **dd),
                        mlp=Mlp(dim, int(dim * mlp_ratio), drop=proj_drop_rate, **dd),
                        drop_path=DropPath(rate) if rate > 0 else nn.Identity(),
                    )
                )
            setattr(self, f"stage{index + 1}", nn.ModuleList(blocks))
        self.norm = nn.LayerNorm(dims[-1], **dd)
        self.head = make_head(dims[-1], self.num_classes, **dd)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)

    @property
    def patch_embed(self) -> ConvStem:
        """Patch embedding, under the name that timm reads the image size from."""
        return self.stage1_conv_embed

    def stage_parts(self, index: int) -> tuple[str, ...]:
        return f"merge{index}" if index else "stage1_conv_embed", f"stage{index + 1}"

    def run_stage(self, index: int, x: Tensor) -> Tensor:
        entry, blocks = (getattr(self, name) for name in self.stage_parts(index))
        x = entry(x)
        return self.run_blocks(blocks, x.flatten(1, 2)).reshape(x.shape)

    def finish(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^stage1_conv_embed",
            "blocks": r"^(?:stage|merge)(\d+)"
            if coarse
            else [(r"^merge(\d+)", (0,)), (r"^stage(\d+)\.(\d+)", None), (r"^norm", (99999,))],
        }


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename attention tensors of an official state dict, and resize its positional encodings."""
    renamed = {_OF_ATTENTION.sub(r"\1attn.\2", name): tensor for name, tensor in unwrap(state_dict).items()}
    return resize_encodings(renamed, model)


_OF_ATTENTION = re.compile(r"^(stage\d+\.\d+\.)((?:qkv|attns|proj)\.)")


_BASE = {"embed_dim": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32)}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    # Parameters and FLOPs: 21.2M, 4.3G; 35.5M, 6.8G; 74.9M, 15.0G; 78.4M, 46.4G
    "flatten_cswin_tiny_224": {"embed_dim": 64, "depths": (2, 4, 18, 1), "num_heads": (2, 4, 8, 16)},
    "flatten_cswin_small_224": {"embed_dim": 64, "depths": (2, 4, 32, 2), "num_heads": (2, 4, 8, 16)},
    "flatten_cswin_base_224": _BASE,
    "flatten_cswin_base_384": {**_BASE, "split_size": 12},
}
default_cfgs = configs(VARIANTS, first_conv="stage1_conv_embed.0")
register(FlattenCswin, VARIANTS, out_indices=(0, 1, 2, 3), feature_cls="getter")
