"""FLatten-PVTv2: timm's PVTv2 with focused linear attention in every block (arXiv 2308.00442)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.layers import to_2tuple
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.pvt_v2 import checkpoint_filter_fn as pvt_v2_filter_fn
from torch import Tensor, nn

from mhacut.errors import UsageError
from mhacut.flatten.attention import DWC_KERNEL, FOCUSING_FACTOR, SeparateFocusedAttention
from mhacut.flatten.family import configs, register, resize_encodings, unwrap


class FlattenPvtV2(PyramidVisionTransformerV2):  # type: ignore[misc]
    """FLatten-PVTv2: PVTv2 with focused linear attention in every block and without spatial reduction."""

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
        super().__init__(sr_ratios=1, **kwargs)  # timm's attention without reduction, replaced below
        dd = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        size = to_2tuple(img_size)
        # The stem has stride 4 and padding: each halving rounds up.
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
    """Translate an official state dict by timm's PVTv2 filter, and resize the positional encodings."""
    return resize_encodings(pvt_v2_filter_fn(unwrap(state_dict), model), model)


_WIDTHS = {"embed_dims": (64, 128, 320, 512), "num_heads": (1, 2, 5, 8)}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    # Parameters and FLOPs: 3.6M, .59G; 12.9M, 2.2G; 22.5M, 4.3G; 38.3M, 7.3G; 51.8M, 10.7G; 67.1M, 12.5G
    "flatten_pvt_v2_b0": {**_WIDTHS, "depths": (2, 2, 2, 2), "embed_dims": (32, 64, 160, 256)},
    "flatten_pvt_v2_b1": {**_WIDTHS, "depths": (2, 2, 2, 2)},
    "flatten_pvt_v2_b2": {**_WIDTHS, "depths": (3, 4, 6, 3)},
    "flatten_pvt_v2_b3": {**_WIDTHS, "depths": (3, 4, 18, 3)},
    "flatten_pvt_v2_b4": {**_WIDTHS, "depths": (3, 8, 27, 3)},
    "flatten_pvt_v2_b5": {**_WIDTHS, "depths": (3, 6, 40, 3), "mlp_ratios": (4, 4, 4, 4)},
}
default_cfgs = configs(VARIANTS, first_conv="patch_embed.proj")
register(FlattenPvtV2, VARIANTS, out_indices=(0, 1, 2, 3), flatten_sequential=True)
