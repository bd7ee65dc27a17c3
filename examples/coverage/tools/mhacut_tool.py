"""mhacut: every unit to half its width, each head its own channels, by chance."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cell import RefusedError
from torch import Tensor, nn
from trial import half_plan

import mhacut
from mhacut.checkpoint.identity import identity_of
from mhacut.checkpoint.record import SlimRecord
from mhacut.checkpoint.write import write_slim
from mhacut.data.preprocessing import Preprocessing
from mhacut.errors import UnsupportedModelError
from mhacut.plan import Plan
from mhacut.surgery.find import find_prunable_layers, model_input_size
from mhacut.surgery.mask import masked_tensors, run_with
from mhacut.surgery.slice import cut as cut_model
from tools import Done


def cut(model: Any, x: Tensor) -> Done:
    try:
        prunable = find_prunable_layers(model)
    except UnsupportedModelError as error:
        raise RefusedError(str(error).partition(";")[0]) from error
    plan = half_plan(prunable, 0)
    cfg = model.pretrained_cfg
    record = SlimRecord(
        identity_of(model, cfg["architecture"], {}),
        plan,
        Preprocessing.resolve(cfg, model_input_size(model, cfg)).to_json(),
        (),
    )
    cut_model(model, plan)
    told = "; ".join(prunable.not_prunable)
    return Done(model, "inner", lambda dense: masked(dense, plan), told, kept=record)


def masked(dense: nn.Module, plan: Plan) -> Callable[..., Any]:
    """The dense model with the contribution of removed channels at zero."""
    channel_scales = {}
    for unit in plan:
        channel_scale = torch.zeros(unit.heads, unit.dense_width)
        channel_scales[unit.key] = channel_scale.scatter(1, torch.tensor(unit.kept), 1.0)
    return partial(run_with, dense, masked_tensors(dense, find_prunable_layers(dense), channel_scales))


def save(done: Done, folder: Path) -> None:
    write_slim(
        folder / "slim.safetensors", done.model, done.kept, dtypes={}, overwrite=False, input_path=None
    )


def load(architecture: str, folder: Path) -> nn.Module:
    return mhacut.load_model(folder / "slim.safetensors")
