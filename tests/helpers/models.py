"""Small versions of the architectures the tests run on, nothing in them dead by accident."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
from torch import nn


@dataclass(frozen=True)
class Case:
    """One timm architecture at test size."""

    architecture: str
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.architecture + "".join(f"-{key}" for key in self.args if key in {"attn_layer", "gated"})


SMALL = {"depth": 2, "img_size": 32, "num_classes": 7}
CASES = (
    Case("vit_tiny_patch16_224", SMALL),
    Case("deit_tiny_distilled_patch16_224", {**SMALL, "embed_dim": 96}),
    Case("deit3_small_patch16_224", {**SMALL, "embed_dim": 96, "num_heads": 3, "init_values": 0.1}),
    Case("vit_small_patch14_reg4_dinov2", {**SMALL, "img_size": 42, "embed_dim": 96, "num_heads": 2}),
    Case("vit_base_patch16_siglip_224", {**SMALL, "embed_dim": 96, "num_heads": 3}),
    Case("vit_base_patch16_clip_quickgelu_224", {**SMALL, "embed_dim": 96, "num_heads": 4}),
    Case("vit_giant_patch14_reg4_dinov2", {**SMALL, "img_size": 42, "embed_dim": 96, "num_heads": 4}),
    Case("aimv2_large_patch14_224", {**SMALL, "img_size": 42, "embed_dim": 96, "num_heads": 3}),
    Case("beit3_base_patch16_224", {**SMALL, "embed_dim": 96, "num_heads": 4}),
    Case("vit_tiny_patch16_224", {**SMALL, "embed_dim": 96, "qk_norm": True}),
)


def slow_except(fast: Collection[str], names: Iterable[str]) -> list:
    """``names`` to parametrize a test with; those that are not in ``fast`` are marked slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def build(case: Case, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """The model in eval mode, moved away from its initial values so that every channel matters.

    Biases, norms and LayerScale are jittered; matrices, which timm starts near zero, are brought to the size
    at which logits and hidden activations vary by about 1.
    """
    torch.manual_seed(seed)
    model = timm.create_model(case.architecture, **case.args).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif parameter.dim() == 2:
                parameter.div_(parameter.std() * parameter.shape[1] ** 0.5)
    return model.to(dtype)


def image(case: Case, *, batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """[batch, 3, H, W], unit variance."""
    size = case.args["img_size"]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference in units of the largest expected value."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())
