"""FLatten-PVT: Pyramid Vision Transformer v1 with focused linear attention (arXiv 2308.00442).

Other differences from the original PVT: no class token, no spatial reduction, and the classifier reads the
plain mean over tokens. The final ``norm`` is in every checkpoint and never applied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, Mlp, PatchEmbed, calculate_drop_path_rates, to_2tuple, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from mhacut.flatten.attention import (
    DWC_KERNEL,
    FOCUSING_FACTOR,
    FocusedBlock,
    SeparateFocusedAttention,
    init_linear,
)
from mhacut.flatten.family import configs, register, resize_encodings, unwrap
from mhacut.flatten.pyramid import Pyramid, make_head

_norm = partial(nn.LayerNorm, eps=1e-6)


class FlattenPvt(Pyramid):
    """FLatten-PVT: 4 stages, with 3136, 784, 196 and 49 tokens for images of 224 pixels."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        depths: Sequence[int] = (2, 2, 2, 2),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        qkv_bias: bool = True,
        focusing_factor: int = FOCUSING_FACTOR,
        kernel_size: int = DWC_KERNEL,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(embed_dims, **kwargs)
        dd = {"device": device, "dtype": dtype}
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        size, channels = to_2tuple(img_size), self.in_chans
        attention: Callable[..., SeparateFocusedAttention] = partial(
            SeparateFocusedAttention,
            qkv_bias=qkv_bias,
            proj_drop=proj_drop_rate,
            focusing_factor=focusing_factor,
            kernel_size=kernel_size,
            **dd,
        )
        for index, dim in enumerate(embed_dims):
            embed = PatchEmbed(size, 2 if index else 4, channels, dim, norm_layer=nn.LayerNorm, **dd)
            size, channels = embed.grid_size, dim
            blocks = []
            for rate in drop_paths[index]:
                blocks.append(
                    FocusedBlock(
                        norm1=_norm(dim, **dd),
                        attn=attention(dim, num_heads[index], size),
                        norm2=_norm(dim, **dd),
                        mlp=Mlp(dim, int(dim * mlp_ratios[index]), drop=proj_drop_rate, **dd),
                        drop_path=DropPath(rate) if rate > 0 else nn.Identity(),
                    )
                )
            setattr(self, f"patch_embed{index + 1}", embed)
            setattr(self, f"pos_embed{index + 1}", nn.Parameter(torch.empty(1, size[0] * size[1], dim, **dd)))
            setattr(self, f"block{index + 1}", nn.ModuleList(blocks))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.norm = _norm(channels, **dd)  # in every checkpoint, never applied
        self.head = make_head(channels, self.num_classes, **dd)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)
        for name in self.pos_embed_grids:
            trunc_normal_(getattr(self, name), std=0.02)

    @property
    def patch_embed(self) -> PatchEmbed:
        """Patch embedding of the first stage, under the name that timm reads the image size from."""
        return self.patch_embed1

    @property
    def pos_embed_grids(self) -> dict[str, tuple[int, int]]:
        return {
            f"pos_embed{index + 1}": getattr(self, f"patch_embed{index + 1}").grid_size
            for index in range(self.num_stages)
        }

    def stage_parts(self, index: int) -> tuple[str, ...]:
        return f"patch_embed{index + 1}", f"pos_embed{index + 1}", f"block{index + 1}"

    def run_stage(self, index: int, x: Tensor) -> Tensor:
        embed, position, blocks = (getattr(self, name) for name in self.stage_parts(index))
        grid = embed.grid_size
        if index:
            x = x.permute(0, 3, 1, 2)
            # From the second stage on, official models resize the embedding, which changes no bit at the size
            # they were built for. Counts of their FLOPs include it.
            position = position.unflatten(1, grid).permute(0, 3, 1, 2)
            position = F.interpolate(position, size=grid, mode="bilinear").flatten(2).transpose(1, 2)
        x = self.run_blocks(blocks, self.pos_drop(embed(x) + position))
        return x.reshape(x.shape[0], *grid, x.shape[-1])

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^patch_embed1|^pos_embed1",
            "blocks": r"^(?:patch_embed|pos_embed|block)(\d+)"
            if coarse
            else [(r"^(?:patch_embed|pos_embed)(\d+)", (0,)), (r"^block(\d+)\.(\d+)", None)],
        }


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Resize the positional encodings of a state dict. Its tensors already have the names of the model."""
    return resize_encodings(unwrap(state_dict), model)


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "flatten_pvt_tiny": {"depths": (2, 2, 2, 2)},  # 12.2M parameters, 2.0G FLOPs
    "flatten_pvt_small": {"depths": (3, 4, 6, 3)},  # 21.7M, 4.0G
    "flatten_pvt_medium": {"depths": (3, 4, 18, 3)},  # 37.2M, 7.1G
    "flatten_pvt_large": {"depths": (3, 8, 27, 3)},  # 50.6M, 10.4G
}
default_cfgs = configs(VARIANTS, first_conv="patch_embed1.proj")
register(FlattenPvt, VARIANTS, out_indices=(0, 1, 2, 3), feature_cls="getter")
