"""Checkpoints of small models, dense and slim, written without pruning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from helpers.models import ModelCase
from helpers.plans import random_plan
from mhacut.checkpoint.identity import identity_of
from mhacut.checkpoint.record import SlimRecord
from mhacut.checkpoint.write import write_slim
from mhacut.data.preprocessing import Preprocessing
from mhacut.plan import Plan
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.slice import cut


@dataclass(frozen=True)
class ModelFile:
    """A checkpoint without metadata, and the arguments that open it."""

    path: Path
    architecture: str
    args: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        return {"model": self.architecture, "model_args": self.args}

    @property
    def flags(self) -> list[str]:
        """The same for the command line, the path first."""
        arguments = [str(self.path), "--model", self.architecture]
        for key, value in self.args.items():
            arguments += ["--model-arg", f"{key}={value}"]
        return arguments


SLIM = {
    "vit": ModelCase(
        "vit_tiny_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}
    ),
    "distilled": ModelCase("deit_tiny_distilled_patch16_224", {"depth": 2, "img_size": 32, "embed_dim": 96}),
    "swin": ModelCase(
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "depths": (1, 2, 1, 1), "embed_dim": 24, "window_size": 2},
    ),
    "coat": ModelCase(
        "coat_tiny",
        {"img_size": 64, "embed_dims": (32,) * 4, "serial_depths": (2, 1, 1, 1), "parallel_depth": 1},
    ),
    "flatten": ModelCase(
        "flatten_swin_tiny_224", {"img_size": 64, "depths": (1, 2, 1, 1), "embed_dim": 24, "window_size": 4}
    ),
}
"""Models that the fixture ``slim_of`` cuts."""


def save_dense(model: nn.Module, path: Path) -> Path:
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, path)
    return path


def cut_into_file(model: nn.Module, plan: Plan, path: Path, case: ModelCase) -> Path:
    entry = {"command": "prune", "flops_before": measure_flops(model, case.size)}
    cut(model, plan)
    record = SlimRecord(
        identity_of(model, case.architecture, {"num_classes": 5, **case.args}),
        plan,
        Preprocessing.resolve(model.pretrained_cfg, case.size).to_json(),
        ({**entry, "flops_after": measure_flops(model, case.size)},),
    )
    write_slim(path, model, record, dtypes={}, overwrite=False, input_path=None)
    return path


def make_slim(name: str, folder: Path) -> Path:
    """Write one of SLIM as ``dense.safetensors`` and a random cut of it as ``slim.safetensors``.

    Each unit has a width of its own, so that q/k and v differ; the last one stays whole. Returns the slim
    file.
    """
    case = SLIM[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = case.create().eval()
    save_dense(model, folder / "dense.safetensors")
    prunable = find_prunable_layers(model)
    *plans, last = random_plan(prunable, seed=0)[0]
    whole = prunable.unit(last.key).keep_first(last.dense_width)
    return cut_into_file(model, Plan((*plans, whole)), folder / "slim.safetensors", case)
