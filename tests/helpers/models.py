"""Models small enough for tests, nothing in them dead by accident."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

SMALL = {"depth": 2, "img_size": 32, "num_classes": 7}
"""Arguments of a ViT at test size."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case(ABC):
    whole: Mapping[str, str] = field(default_factory=dict)
    """Kinds that some layer does not let be cut, and why."""
    revived: tuple[str, ...] = ()
    """Kinds whose channels are not zero when all that they are made of is."""
    fast: bool = False
    """Whether the fast suite holds it to every property too."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, int, int]:
        """Channels, height and width of its images."""

    @abstractmethod
    def create(self) -> nn.Module:
        """Build it with its initial weights."""


@dataclass(frozen=True, eq=False)
class ModelCase(Case):
    """A timm model at test size, of 5 classes if ``args`` do not say."""

    architecture: str
    args: Mapping[str, Any] = field(default_factory=dict)
    side: int | None = None
    """Height and width of its images, where ``img_size`` is no argument of it."""
    adapt: Callable[[nn.Module], object] | None = field(default=None, kw_only=True)
    """What the tests change in it."""
    flops: str = field(default="80%", kw_only=True)
    """A budget within its reach."""

    @property
    def size(self) -> tuple[int, int, int]:
        side = self.side or self.args["img_size"]
        height, width = (side, side) if isinstance(side, int) else side
        return 3, height, width

    @property
    def id(self) -> str:
        return "-".join([self.architecture, *self.args])

    def create(self) -> nn.Module:
        model = timm.create_model(self.architecture, **{"num_classes": 5, **self.args})
        if self.adapt is not None:
            self.adapt(model)
        return model


@dataclass(frozen=True, eq=False)
class LayerCase(Case):
    make: Callable[[], nn.Module]
    dim: int = field(default=12, kw_only=True)
    """Channels of what it takes."""
    out: int | None = field(default=None, kw_only=True)
    """Channels of what it gives, where that is not ``dim``."""
    side: int = field(default=4, kw_only=True)
    tokens: bool = field(default=True, kw_only=True)
    """Whether it takes [B, N, C], not [B, C, H, W]."""
    args: tuple = field(default=(), kw_only=True)
    """What its forward takes besides."""
    mlp: bool = field(default=False, kw_only=True)

    @property
    def size(self) -> tuple[int, int, int]:
        return self.dim, self.side, self.side

    def create(self) -> nn.Module:
        return Alone(self)


class Alone(nn.Module):
    """One layer on a map of points, or on the points as tokens; pooled to logits.

    In front of an MLP there is attention, since nothing without attention is cut.
    """

    def __init__(self, case: LayerCase) -> None:
        super().__init__()
        self.before = Attention(case.dim, num_heads=2) if case.mlp else None
        self.layer, self.tokens, self.args = case.make(), case.tokens, case.args
        self.head = nn.Linear(case.out or case.dim, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = image.flatten(2).transpose(1, 2)  # (B, N, C)
        if self.before is not None:
            x = x + self.before(x)
        if not self.tokens:
            x = x.transpose(1, 2).unflatten(2, image.shape[2:])  # (B, C, H, W)
        args = [part.to(x) if isinstance(part, Tensor) else part for part in self.args]
        x = self.layer(x, *args)
        if self.tokens:
            x = x.transpose(1, 2)
        return self.head(x.flatten(2).mean(-1))


def build(case: Case, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """The model of ``case`` in eval mode, far from its initial weights, so that every channel matters."""
    return copy.deepcopy(_built(case, seed)).to(dtype)


@lru_cache(maxsize=32)
def _built(case: Case, seed: int) -> nn.Module:
    return build_once(case, seed)


def build_once(case: Case, seed: int = 0) -> nn.Module:
    """The same in float64, without a copy that is kept: for models that are large."""
    torch.manual_seed(seed)
    model = case.create().double()
    model.eval()  # returns None for some of timm's attention
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
            if isinstance(module, _BatchNorm):
                module.weight.add_(0.5)
                module.running_mean.add_(0.3 * noise(module.running_mean))
                module.running_var.mul_(0.5 + noise(module.running_var).abs())
    return model


def image(case: Case, *, batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """[batch, C, H, W], unit variance."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *case.size, generator=generator, dtype=torch.float64).to(dtype)


def double(case: Case, *, batch: int = 2) -> tuple[nn.Module, Tensor]:
    return build(case, dtype=torch.float64).requires_grad_(False), image(
        case, dtype=torch.float64, batch=batch
    )


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference in units of the largest expected value."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def slow_but(exhaustive: Collection[str], names: Iterable[str]) -> list:
    """``names`` to parametrize a test with, marked slow; those in ``exhaustive`` are marked so instead."""
    return [
        pytest.param(name, marks=pytest.mark.exhaustive if name in exhaustive else pytest.mark.slow)
        for name in names
    ]


def slow_except(fast: Collection[str], names: Iterable[str]) -> list:
    """``names`` to parametrize a test with; those that are not in ``fast`` are marked slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]
