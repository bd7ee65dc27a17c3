"""FLatten-DeiT: described by the paper (arXiv 2308.00442), without official code.

This model follows the paper's text: a DeiT-Tiny whose blocks all have focused linear attention, as in
FLatten-PVT. It has no class token, which would have no place on the map of the depthwise convolution; the
classifier reads the mean over tokens. The paper reports 6.1M parameters and 1.1G FLOPs. A checkpoint of the
authors, if they publish one, may not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mhacut.errors import UsageError
from mhacut.flatten.attention import DWC_KERNEL, FOCUSING_FACTOR, FusedFocusedAttention
from mhacut.flatten.family import configs, register, resize_encodings, unwrap


class FlattenDeit(VisionTransformer):  # type: ignore[misc]
    """FLatten-DeiT: timm's ViT without a class token, with focused linear attention in every block."""

    def __init__(
        self,
        qkv_bias: bool = True,
        proj_drop_rate: float = 0.0,
        focusing_factor: int = FOCUSING_FACTOR,
        kernel_size: int = DWC_KERNEL,
        **kwargs: Any,
    ) -> None:
        # The positional encoding of keys has a row for every token of the map, and for no other.
        for name in ("class_token", "reg_tokens", "dynamic_img_size", "dynamic_img_pad", "qk_norm"):
            if kwargs.get(name):
                raise UsageError(
                    f"{name}: focused linear attention needs a fixed token grid; leave the argument out"
                )
        fixed = {"class_token": False, "global_pool": "avg", "fc_norm": False}
        super().__init__(qkv_bias=qkv_bias, proj_drop_rate=proj_drop_rate, **{**fixed, **kwargs})
        for block in self.blocks:
            block.attn = FusedFocusedAttention(
                self.embed_dim,
                block.attn.num_heads,
                self.patch_embed.grid_size,
                qkv_bias=qkv_bias,
                proj_drop=proj_drop_rate,
                focusing_factor=focusing_factor,
                kernel_size=kernel_size,
                device=kwargs.get("device"),
                dtype=kwargs.get("dtype"),
            )

    @property
    def pos_embed_grids(self) -> dict[str, tuple[int, int]]:
        return {"pos_embed": self.patch_embed.grid_size}

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        super().set_input_size(*args, **kwargs)
        for block in self.blocks:
            block.attn.set_grid_size(tuple(self.patch_embed.grid_size))


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Resize the positional encodings of a state dict. Its tensors already have the names of the model."""
    return resize_encodings(unwrap(state_dict), model)


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    # 6.2M parameters and 1.1G FLOPs
    "flatten_deit_tiny": {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
}
default_cfgs = configs(VARIANTS, first_conv="patch_embed.proj", pool_size=None)
register(FlattenDeit, VARIANTS, out_indices=3, feature_cls="getter")
