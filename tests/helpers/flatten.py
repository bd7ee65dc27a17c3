"""Small FLatten Transformers and the softmax attention beside theirs."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

# One of each family, at a size that takes no time: 64 pixels, 16 x 16 tokens in stage 1.
SMALL = {
    "flatten_pvt_tiny": {"depths": (1, 1, 2, 1), "embed_dims": (16, 32, 40, 64)},
    "flatten_pvt_v2_b0": {"depths": (1, 1, 2, 1), "embed_dims": (16, 32, 40, 64)},
    "flatten_swin_tiny_224": {"depths": (1, 1, 2, 1), "embed_dim": 24, "window_size": 2},
    "flatten_cswin_tiny_224": {"depths": (1, 1, 2, 1), "embed_dim": 16, "split_size": 2},
    "flatten_deit_tiny": {"depth": 3, "embed_dim": 48},
}

CASES = {
    **{name: (name, args) for name, args in SMALL.items()},
    "timm swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": (1, 2, 1, 1), "embed_dim": 24, "window_size": 2},
    ),
    # Two of its stages reduce their keys by a convolution; of PVTv2 with pooling, all.
    "timm pvt": (
        "pvt_v2_b0",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 40, 64), "sr_ratios": (4, 2, 1, 1)},
    ),
    "timm pvt pooled": ("pvt_v2_b2_li", {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 40, 64)}),
}
FREE_SIZE = {"timm pvt", "timm pvt pooled"}
SIZE = (3, 64, 64)


def build(case: str, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """In eval mode, at 64 pixels, far from its initial values so that every channel matters."""
    name, args = CASES[case]
    size = {} if case in FREE_SIZE else {"img_size": 64}
    generator = torch.Generator().manual_seed(seed)
    model = timm.create_model(name, num_classes=5, **size, **args).double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() == 2 and key.endswith("weight"):
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            elif parameter.dim() == 4:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.3 * noise)
    return model.to(dtype)


def image(dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    return torch.randn(batch, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )
