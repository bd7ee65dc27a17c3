"""Layers of timm beside ``layers.Attention``, each alone between image and logits, and small models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.layers import Attention, ConvMlp, LayerNorm2d
from timm.models import (
    efficientformer,
    efficientformer_v2,
    efficientvit_msra,
    fastvit,
    gemma4_vit,
    levit,
    shvit,
    swiftformer,
    tiny_vit,
    visformer,
    vitamin,
)
from torch import Tensor, nn


class Alone(nn.Module):
    """One layer on a map of 4x4 points, or on the points as tokens; pooled to logits.

    In front of an MLP there is attention, since nothing without attention is cut.
    """

    def __init__(self, layer: nn.Module, dim: int, *, tokens: bool, out: int | None, args: tuple) -> None:
        super().__init__()
        self.before = None if out is None else Attention(dim, num_heads=2)
        self.layer, self.tokens, self.args = layer, tokens, args
        self.head = nn.Linear(out or dim, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = image.flatten(2).transpose(1, 2)
        if self.before is not None:
            x = x + self.before(x)
        if not self.tokens:
            x = x.transpose(1, 2).unflatten(2, image.shape[2:])
        x = self.layer(x, *self.args)
        if self.tokens:
            x = x.transpose(1, 2)
        return self.head(x.flatten(2).mean(-1))


@dataclass(frozen=True)
class LayerCase:
    """How to make one layer."""

    make: Callable[[], nn.Module]
    dim: int = 12
    tokens: bool = True
    args: tuple = ()
    mlp: bool = False
    """Whether it is an MLP."""

    size = property(lambda self: (self.dim, 4, 4))

    def create(self) -> nn.Module:
        return Alone(
            self.make(), self.dim, tokens=self.tokens, out=self.dim if self.mlp else None, args=self.args
        )


@dataclass(frozen=True)
class ModelCase:
    """A timm model at test size."""

    architecture: str
    args: dict[str, Any] = field(default_factory=dict)
    side: int = 64

    size = property(lambda self: (3, self.side, self.side))

    def create(self) -> nn.Module:
        return timm.create_model(self.architecture, num_classes=5, **self.args)


def _mlp(make: Callable[[], nn.Module], *, tokens: bool = False) -> LayerCase:
    return LayerCase(make, tokens=tokens, mlp=True)


MLPS = {
    "ConvMlp": _mlp(lambda: ConvMlp(12, 20)),
    "ConvMlp, batch norm": _mlp(lambda: ConvMlp(12, 20, norm_layer=nn.BatchNorm2d, bias=False)),
    "levit": _mlp(lambda: levit.LevitMlp(12, 20), tokens=True),
    "levit, convolutions": _mlp(lambda: levit.LevitMlp(12, 20, use_conv=True)),
    "vitamin": _mlp(lambda: vitamin.GeGluMlp(12, 20), tokens=True),
    "fastvit": _mlp(lambda: fastvit.ConvMlp(12, 20)),
    "tiny_vit": _mlp(lambda: tiny_vit.NormMlp(12, 20), tokens=True),
    "swiftformer": _mlp(lambda: swiftformer.Mlp(12, 20)),
    "efficientformer": _mlp(lambda: efficientformer.ConvMlpWithNorm(12, 20)),
    "efficientformer, no norm": _mlp(lambda: efficientformer.ConvMlpWithNorm(12, 20, norm_layer=None)),
    "efficientformer_v2": _mlp(lambda: efficientformer_v2.ConvMlpWithNorm(12, 20)),
    "efficientformer_v2, depthwise": _mlp(
        lambda: efficientformer_v2.ConvMlpWithNorm(12, 20, mid_conv=True, act_layer=nn.GELU)
    ),
    "efficientvit_msra": _mlp(lambda: efficientvit_msra.ConvMlp(12, 20)),
    "shvit": _mlp(lambda: shvit.FFN(12, 20)),
    "visformer": _mlp(lambda: visformer.SpatialMlp(12, 20)),
    "gemma4": _mlp(lambda: gemma4_vit.Gemma4GatedMlp(12, 20), tokens=True),
    "gemma4, clipped": _mlp(
        lambda: clipped(gemma4_vit.Gemma4GatedMlp(12, 20, use_clipped_linears=True)), tokens=True
    ),
}
WHOLE = {
    "ConvMlp, layer norm": (
        _mlp(lambda: ConvMlp(12, 20, norm_layer=LayerNorm2d)),
        {"hidden": "a norm runs over all hidden channels"},
    ),
    "visformer, in groups": (
        _mlp(lambda: visformer.SpatialMlp(16, 20, spatial_conv=True, group=8)),
        {"hidden": "a convolution mixes hidden channels"},
    ),
}
"""What of a layer must stay, and why."""
ATTENTION: dict[str, LayerCase] = {}
LAYERS = {**{f"mlp {name}": case for name, case in MLPS.items()}, **ATTENTION}
MODELS: dict[str, ModelCase] = {}
CASES: dict[str, LayerCase | ModelCase] = {**LAYERS, **MODELS}


def clipped(module: nn.Module) -> nn.Module:
    """``module`` with clamps that bite."""
    for name, buffer in module.named_buffers():
        buffer.fill_(-0.7 if name.endswith("min") else 0.8)
    return module


def build(case: LayerCase | ModelCase, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """In eval mode, far from initial values, batch norms included, so that everything matters."""
    torch.manual_seed(seed)
    model = case.create().double()
    model.eval()  # of some of timm's attention it returns None
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and name.endswith("weight"):
                parameter.copy_(noise(parameter) / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.3 * noise(parameter))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.add_(0.5)
                module.running_mean.add_(0.3 * noise(module.running_mean))
                module.running_var.mul_(0.5 + noise(module.running_var).abs())
    return model.to(dtype)


def image(case: LayerCase | ModelCase, *, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *case.size, generator=generator, dtype=torch.float64).to(dtype)
