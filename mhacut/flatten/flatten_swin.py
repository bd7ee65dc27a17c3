"""FLatten-Swin: timm's Swin with focused linear attention in its first stages (arXiv 2308.00442).

As in the paper, stages 1 and 2 are linear, with the whole map as their window and no shift; stages 3 and 4
keep windows and softmax.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer import checkpoint_filter_fn as swin_filter_fn
from torch import Tensor, nn

from mhacut.errors import UsageError
from mhacut.flatten.attention import DWC_KERNEL, FOCUSING_FACTOR, FocusedBlock, FusedFocusedAttention, Grid
from mhacut.flatten.family import configs, register, resize_encodings, unwrap


class FocusedSwinBlock(FocusedBlock):
    """Swin block with focused linear attention over the whole map, on maps [B, H, W, C]."""

    def __init__(self, block: SwinTransformerBlock, attn: FusedFocusedAttention) -> None:
        """Take all submodules except the attention from ``block``."""
        super().__init__(block.norm1, attn, block.norm2, block.mlp, block.drop_path1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, 2)).reshape(x.shape)

    def set_input_size(self, feat_size: Grid, window_size: Any, always_partition: Any = None) -> None:
        """Adapt the block to a map of size ``feat_size``. The attention window is always the whole map."""
        attn: Any = self.attn
        attn.set_grid_size(tuple(feat_size))


class FlattenSwin(SwinTransformer):  # type: ignore[misc]
    """FLatten-Swin: Swin with focused linear attention in the stages marked ``L`` in ``attn_type``."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        attn_type: str = "LLSS",
        window_size: int = 7,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        qkv_bias: bool = True,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        focusing_factor: int = FOCUSING_FACTOR,
        kernel_size: int = DWC_KERNEL,
        **kwargs: Any,
    ) -> None:
        if len(attn_type) != len(depths) or set(attn_type) - {"L", "S"}:
            raise UsageError(f"attn_type {attn_type!r}: expected L or S for each of {len(depths)} stages")
        if kwargs.get("dynamic_img_size") or not kwargs.get("strict_img_size", True):
            raise UsageError(
                "dynamic_img_size: the positional encoding of focused linear attention fixes the size of the "
                "images; build the model for their size with img_size="
            )
        super().__init__(
            img_size=img_size,
            window_size=window_size,
            depths=tuple(depths),
            num_heads=tuple(num_heads),
            qkv_bias=qkv_bias,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            **kwargs,
        )
        # timm makes softmax blocks, of which linear stages take all but the attention.
        for kind, stage, heads in zip(attn_type, self.layers, num_heads, strict=True):
            if kind == "S":
                continue
            stage.blocks = nn.Sequential(
                *(
                    FocusedSwinBlock(
                        block,
                        FusedFocusedAttention(
                            block.dim,
                            heads,
                            tuple(stage.output_resolution),
                            qkv_bias=qkv_bias,
                            proj_drop=proj_drop_rate,
                            focusing_factor=focusing_factor,
                            kernel_size=kernel_size,
                            device=kwargs.get("device"),
                            dtype=kwargs.get("dtype"),
                        ),
                    )
                    for block in stage.blocks
                )
            )


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Translate an official state dict by timm's Swin filter, and resize the positional encodings."""
    # Position biases bypass timm's filter, which would resize them by a deprecated function of PyTorch.
    state_dict = unwrap(state_dict)
    past = {name: tensor for name, tensor in state_dict.items() if not _for_timm(name, tensor)}
    rest = {name: tensor for name, tensor in state_dict.items() if name not in past}
    return resize_encodings({**swin_filter_fn(rest, model), **past}, model)


def _for_timm(name: str, tensor: Tensor) -> bool:
    if "patch_embed.proj.weight" in name:
        return tensor.ndim == 4
    # timm's filter takes "model" and "state_dict" for parts of a file, never for tensors.
    return not name.endswith("relative_position_bias_table") and name not in ("model", "state_dict")


_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    # Parameters and FLOPs: 29.2M, 4.5G; 50.5M, 8.8G; 89.0M, 15.5G; 91.4M, 46.5G
    "flatten_swin_tiny_224": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "flatten_swin_small_224": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "flatten_swin_base_224": _BASE,
    "flatten_swin_base_384": {**_BASE, "window_size": 12},
}
default_cfgs = configs(VARIANTS, first_conv="patch_embed.proj", classifier="head.fc")
register(FlattenSwin, VARIANTS, out_indices=(0, 1, 2, 3), flatten_sequential=True)
