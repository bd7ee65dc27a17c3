"""FLatten-CSWin: CSWin with focused linear attention over the whole map in stages 1 and 2 (arXiv 2308.00442).

Stages 3 and 4 are those of CSWin (Dong et al., CVPR 2022, arXiv 2107.00652): in stage 3 one half of the
channels attends within vertical stripes of the map, the other half within horizontal ones; in stage 4 all
channels attend over the whole map.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from timm.layers import DropPath, Mlp, calculate_drop_path_rates, to_2tuple
from timm.layers.trace_utils import _assert
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mhacut.errors import UsageError
from mhacut.flatten.attention import DWC_KERNEL, FOCUSING_FACTOR, FocusedBlock, Grid, init_linear
from mhacut.flatten.checkpoints import resize_encodings, unwrap
from mhacut.flatten.configs import config
from mhacut.flatten.cswin_attention import Branch, CswinAttention, linear_branches, stripe_branches
from mhacut.flatten.pyramid import Pyramid, make_head


class ConvStem(nn.Sequential):
    """7x7 convolution of stride 4, then a norm: images to a map, [B, H, W, C].

    Its image size is kept under the names of timm's PatchEmbed, where timm looks it up.
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
        self.strict_img_size = True

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.img_size
        _assert(x.shape[-2] == height, f"Input height ({x.shape[-2]}) doesn't match model ({height}).")
        _assert(x.shape[-1] == width, f"Input width ({x.shape[-1]}) doesn't match model ({width}).")
        conv, to_channels_last, norm = self
        return norm(to_channels_last(conv(x)))


class ToChannelsLast(nn.Module):
    """Permutation from [B, C, H, W] to [B, H, W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class MergeBlock(nn.Module):
    """3x3 convolution of stride 2 between stages, then a norm: [B, H, W, C] to [B, H / 2, W / 2, C_out]."""

    def __init__(self, dim: int, out_dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(out_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class FlattenCswin(Pyramid):
    """CSWin with focused linear attention in the stages that ``attn_type`` marks L.

    Args:
        img_size: height and width of the images; their map in stage 3 must divide into stripes.
        in_chans: channels of the images.
        num_classes: number of classes; 0 for a model without a classifier.
        global_pool: ``avg``, or ``""`` for none.
        embed_dim: channels of stage 1; each further stage has twice as many.
        depths: blocks per stage.
        num_heads: heads per stage.
        split_size: width of the stripes of softmax stages, in tokens. Where that is the whole map, and in
            the last stage, a block has one branch over the whole map instead of two.
        attn_type: a letter per stage, L for focused linear attention, S for softmax in stripes.
        mlp_ratio: ratio of hidden to outer channels of the MLPs.
        qkv_bias: whether q, k and v have biases.
        focusing_factor: power p of focused linear attention.
        kernel_size: size of its depthwise convolution.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the projection and in the MLP.
        attn_drop_rate: dropout of softmax attention weights.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0.
            The authors train with 0.2 (tiny), 0.4 (small), 0.5 (base) or 0.7 (base, 384).
        device: as in torch.
        dtype: as in torch.

    Raises:
        UsageError: ``attn_type`` does not fit ``depths``, or stripes do not tile a map.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        split_size: int = 7,
        attn_type: str = "LLSS",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        focusing_factor: int = FOCUSING_FACTOR,
        kernel_size: int = DWC_KERNEL,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if len(attn_type) != len(depths) or set(attn_type) - {"L", "S"}:
            raise UsageError(f"attn_type {attn_type!r}: expected L or S for each of {len(depths)} stages")
        dims = [embed_dim * 2**index for index in range(len(depths))]
        super().__init__(
            dims=dims,
            reductions=[4 * 2**index for index in range(len(depths))],
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        dd = {"device": device, "dtype": dtype}
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stage1_conv_embed = ConvStem(to_2tuple(img_size), in_chans, embed_dim, **dd)
        grid: Grid = self.stage1_conv_embed.grid_size
        linear: Callable[..., list[Branch]] = partial(
            linear_branches, focusing_factor=focusing_factor, kernel_size=kernel_size, **dd
        )
        stripes: Callable[..., list[Branch]] = partial(stripe_branches, attn_drop=attn_drop_rate, **dd)
        block: Callable[..., FocusedBlock] = partial(
            _block, qkv_bias=qkv_bias, mlp_ratio=mlp_ratio, proj_drop=proj_drop_rate, **dd
        )
        for index, (dim, heads, kind) in enumerate(zip(dims, num_heads, attn_type, strict=True)):
            if index:
                setattr(self, f"merge{index}", MergeBlock(dims[index - 1], dim, **dd))
                grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
            width = None if index == len(dims) - 1 else split_size
            blocks = []
            for rate in drop_paths[index]:
                size = (dim, heads, grid)
                branches = linear(*size) if kind == "L" else stripes(*size, split_size=width)
                blocks.append(block(dim, branches, drop_path=rate))
            setattr(self, f"stage{index + 1}", nn.ModuleList(blocks))
        self.norm = nn.LayerNorm(dims[-1], **dd)
        self.head = make_head(dims[-1], num_classes, **dd)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)

    @property
    def patch_embed(self) -> ConvStem:
        """The stem, under the name where timm expects the image size."""
        return self.stage1_conv_embed

    def stage_parts(self, index: int) -> tuple[str, ...]:
        return f"merge{index}" if index else "stage1_conv_embed", f"stage{index + 1}"

    def run_stage(self, index: int, x: Tensor) -> Tensor:
        entry, blocks = (getattr(self, name) for name in self.stage_parts(index))
        x = entry(x)
        return self.run_blocks(blocks, x.flatten(1, 2)).reshape(x.shape)

    def finish(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def no_weight_decay(self) -> set[str]:
        """Return no names: the authors decay everything that is not 1-D."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^stage1_conv_embed",
            "blocks": r"^(?:stage|merge)(\d+)"
            if coarse
            else [(r"^merge(\d+)", (0,)), (r"^stage(\d+)\.(\d+)", None), (r"^norm", (99999,))],
        }


def _block(
    dim: int,
    branches: Sequence[Branch],
    *,
    qkv_bias: bool,
    mlp_ratio: float,
    proj_drop: float,
    drop_path: float,
    device: Any,
    dtype: Any,
) -> FocusedBlock:
    dd = {"device": device, "dtype": dtype}
    return FocusedBlock(
        norm1=nn.LayerNorm(dim, **dd),
        attn=CswinAttention(dim, branches, qkv_bias=qkv_bias, proj_drop=proj_drop, **dd),
        norm2=nn.LayerNorm(dim, **dd),
        mlp=Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd),
        drop_path=DropPath(drop_path) if drop_path > 0 else nn.Identity(),
    )


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the attention's tensors of an official state dict, and resize encodings."""
    own = {_OF_ATTENTION.sub(r"\1attn.\2", name): tensor for name, tensor in unwrap(state_dict).items()}
    return resize_encodings(own, model)


_OF_ATTENTION = re.compile(r"^(stage\d+\.\d+\.)((?:qkv|attns|proj)\.)")


def _create(variant: str, pretrained: bool, **kwargs: Any) -> FlattenCswin:
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    return build_model_with_cfg(
        FlattenCswin,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


def _config(**own: Any) -> dict[str, Any]:
    return config(first_conv="stage1_conv_embed.0", **own)


default_cfgs = generate_default_cfgs(
    {
        "flatten_cswin_tiny_224.untrained": _config(),
        "flatten_cswin_small_224.untrained": _config(),
        "flatten_cswin_base_224.untrained": _config(),
        "flatten_cswin_base_384.untrained": _config(input_size=(3, 384, 384), pool_size=(12, 12)),
    }
)


@register_model
def flatten_cswin_tiny_224(pretrained: bool = False, **kwargs: Any) -> FlattenCswin:
    """FLatten-CSWin-T: 21.2M parameters, 4.3G FLOPs."""
    args = {"embed_dim": 64, "depths": (2, 4, 18, 1), "num_heads": (2, 4, 8, 16), **kwargs}
    return _create("flatten_cswin_tiny_224", pretrained, **args)


@register_model
def flatten_cswin_small_224(pretrained: bool = False, **kwargs: Any) -> FlattenCswin:
    """FLatten-CSWin-S: 35.5M parameters, 6.8G FLOPs."""
    args = {"embed_dim": 64, "depths": (2, 4, 32, 2), "num_heads": (2, 4, 8, 16), **kwargs}
    return _create("flatten_cswin_small_224", pretrained, **args)


@register_model
def flatten_cswin_base_224(pretrained: bool = False, **kwargs: Any) -> FlattenCswin:
    """FLatten-CSWin-B: 74.9M parameters, 15.0G FLOPs."""
    args = {"embed_dim": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32), **kwargs}
    return _create("flatten_cswin_base_224", pretrained, **args)


@register_model
def flatten_cswin_base_384(pretrained: bool = False, **kwargs: Any) -> FlattenCswin:
    """FLatten-CSWin-B at 384 pixels, stripes of 12: 78.4M parameters, 46.4G FLOPs."""
    args = {
        "embed_dim": 96,
        "depths": (3, 6, 29, 2),
        "num_heads": (4, 8, 16, 32),
        "split_size": 12,
        **kwargs,
    }
    return _create("flatten_cswin_base_384", pretrained, **args)
