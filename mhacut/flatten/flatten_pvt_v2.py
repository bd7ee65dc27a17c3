"""FLatten-PVTv2: timm's PVTv2 with focused linear attention in every block (arXiv 2308.00442)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.pvt_v2 import checkpoint_filter_fn as pvt_v2_filter_fn
from torch import Tensor, nn

from mhacut.errors import UsageError
from mhacut.flatten.attention import DWC_KERNEL, FOCUSING_FACTOR, SeparateFocusedAttention
from mhacut.flatten.checkpoints import resize_encodings, unwrap
from mhacut.flatten.configs import config


class FlattenPvtV2(PyramidVisionTransformerV2):  # type: ignore[misc]
    """PVTv2 whose attention is :class:`SeparateFocusedAttention` without spatial reduction.

    Args:
        img_size: height and width of the images; the positional encodings of the keys fix it.
        focusing_factor: power p of focused linear attention.
        kernel_size: size of its depthwise convolution.
        kwargs: further arguments of timm's PVTv2, except those of its own attention.

    Raises:
        UsageError: an argument of PVTv2's own attention is given.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        focusing_factor: int = FOCUSING_FACTOR,
        kernel_size: int = DWC_KERNEL,
        **kwargs: Any,
    ) -> None:
        for name in ("sr_ratios", "linear", "attn_drop_rate"):
            if name in kwargs:
                raise UsageError(f"{name}: focused linear attention has no such argument; leave it out")
        super().__init__(sr_ratios=1, **kwargs)
        dd = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        size = to_2tuple(img_size)
        grid = (_halved(_halved(size[0])), _halved(_halved(size[1])))
        # Under the names of timm's PatchEmbed, where the size of a model is looked up.
        self.patch_embed.img_size, self.patch_embed.grid_size = size, grid
        self.patch_embed.strict_img_size = True
        for index, stage in enumerate(self.stages):
            if index:
                grid = (_halved(grid[0]), _halved(grid[1]))
            for block in stage.blocks:
                block.attn = SeparateFocusedAttention(
                    block.attn.dim,
                    block.attn.num_heads,
                    grid,
                    qkv_bias=kwargs.get("qkv_bias", True),
                    proj_drop=kwargs.get("proj_drop_rate", 0.0),
                    focusing_factor=focusing_factor,
                    kernel_size=kernel_size,
                    **dd,
                )
                block.attn.apply(self._init_weights)


def _halved(size: int) -> int:
    return (size + 1) // 2


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Translate an official state dict by timm's own filter, and resize encodings."""
    return resize_encodings(pvt_v2_filter_fn(unwrap(state_dict), model), model)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> FlattenPvtV2:
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    return build_model_with_cfg(
        FlattenPvtV2,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True, "out_indices": out_indices},
        **{"embed_dims": (64, 128, 320, 512), "num_heads": (1, 2, 5, 8), **kwargs},
    )


default_cfgs = generate_default_cfgs(
    {f"flatten_pvt_v2_b{number}.untrained": config(first_conv="patch_embed.proj") for number in range(6)}
)


@register_model
def flatten_pvt_v2_b0(pretrained: bool = False, **kwargs: Any) -> FlattenPvtV2:
    """FLatten-PVTv2-B0: 3.6M parameters, 0.59G FLOPs."""
    args = {"depths": (2, 2, 2, 2), "embed_dims": (32, 64, 160, 256), **kwargs}
    return _create("flatten_pvt_v2_b0", pretrained, **args)


@register_model
def flatten_pvt_v2_b1(pretrained: bool = False, **kwargs: Any) -> FlattenPvtV2:
    """FLatten-PVTv2-B1: 12.9M parameters, 2.2G FLOPs."""
    return _create("flatten_pvt_v2_b1", pretrained, **{"depths": (2, 2, 2, 2), **kwargs})


@register_model
def flatten_pvt_v2_b2(pretrained: bool = False, **kwargs: Any) -> FlattenPvtV2:
    """FLatten-PVTv2-B2: 22.5M parameters, 4.3G FLOPs."""
    return _create("flatten_pvt_v2_b2", pretrained, **{"depths": (3, 4, 6, 3), **kwargs})


@register_model
def flatten_pvt_v2_b3(pretrained: bool = False, **kwargs: Any) -> FlattenPvtV2:
    """FLatten-PVTv2-B3: 38.3M parameters, 7.3G FLOPs."""
    return _create("flatten_pvt_v2_b3", pretrained, **{"depths": (3, 4, 18, 3), **kwargs})


@register_model
def flatten_pvt_v2_b4(pretrained: bool = False, **kwargs: Any) -> FlattenPvtV2:
    """FLatten-PVTv2-B4: 51.8M parameters, 10.7G FLOPs."""
    return _create("flatten_pvt_v2_b4", pretrained, **{"depths": (3, 8, 27, 3), **kwargs})


@register_model
def flatten_pvt_v2_b5(pretrained: bool = False, **kwargs: Any) -> FlattenPvtV2:
    """FLatten-PVTv2-B5: 67.1M parameters, 12.5G FLOPs."""
    args = {"depths": (3, 6, 40, 3), "mlp_ratios": (4, 4, 4, 4), **kwargs}
    return _create("flatten_pvt_v2_b5", pretrained, **args)
