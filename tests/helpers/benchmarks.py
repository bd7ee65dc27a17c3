"""The scripts in examples/benchmarks, and what is small enough for them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import timm
import torch

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
DIGITS = BENCHMARKS.parent / "digits"
sys.path.insert(0, str(BENCHMARKS))  # the scripts import the package methods/ beside them


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SMALL_VIT = {"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2}


def small_vit(**more: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = (
        timm.create_model("vit_tiny_patch16_224", num_classes=5, **SMALL_VIT, **more)
        .eval()
        .requires_grad_(False)
    )
    for parameter in model.parameters():
        spread = 0.3 if parameter.dim() == 1 else 2 / parameter[0].numel() ** 0.5
        parameter += spread * torch.randn_like(parameter)
    return model


def task_of(model, share: float, **options: Any) -> Any:
    from methods.common import Task

    images = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return Task.of(model, (3, 16, 16), images, torch.arange(24) % 5, share, options)
