"""A small model for each attention class of timm and each of its options, nothing dead by accident."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One timm architecture at test size."""

    architecture: str
    args: dict[str, Any] = field(default_factory=dict)
    size: int = 32
    whole: frozenset[str] = frozenset()
    """Kinds that some layer must leave whole."""


def _eva(architecture: str, size: int = 32, whole: frozenset[str] = frozenset(), **args: Any) -> Case:
    small = {"depth": 2, "img_size": size, "embed_dim": 48, "num_heads": 3, **args}
    return Case(architecture, small, size, whole)


CASES = {
    "rope interleaved": _eva("vit_small_patch16_rope_224"),
    "rope mixed": _eva("vit_small_patch16_rope_mixed_ape_224"),
    "rope half": _eva("vit_small_patch16_rope_224", rope_rotate_half=True),
    "rope normalised": _eva("vit_small_patch16_rope_224", qk_norm=True, whole=frozenset({"qk"})),
    "rope shared keys": _eva(
        "vit_small_patch16_rope_224",
        qkv_fused=False,
        num_kv_heads=1,
        whole=frozenset({"qk", "v"}),
    ),
    "eva biases in parts": _eva("eva02_tiny_patch14_224", size=42),
    "eva separate": _eva("eva02_base_patch14_224", size=42, scale_mlp=False),
    "eva norm behind": _eva("eva02_base_patch16_clip_224", whole=frozenset({"v", "hidden"})),
    "eva half": _eva("vit_small_patch16_dinov3"),
    "eva bias": _eva("vit_small_patch16_dinov3_qkvb"),
}


_BUILT: dict[str, nn.Module] = {}


def build(case: Case, *, dtype: torch.dtype = torch.float64) -> nn.Module:
    """In eval mode, far from its initial values and its initial statistics, so that every channel matters."""
    key = repr(case)
    if key not in _BUILT:
        _BUILT[key] = _build(case)
    return copy.deepcopy(_BUILT[key]).to(dtype)


def _build(case: Case, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = timm.create_model(case.architecture, num_classes=5, **case.args).double().eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if key.endswith("running_var"):
                tensor.mul_(1 + 0.5 * noise.tanh())
            elif tensor.dim() in (2, 4) and key.endswith("weight"):
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
            else:
                tensor.add_(0.2 * noise)
    return model


def image(case: Case, *, batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """[batch, 3, size, size], unit variance."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, case.size, case.size, generator=generator, dtype=torch.float64).to(dtype)
