"""A model pruned in a second or two, and what its file states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

import mhacut
from helpers.files import ModelFile

QUICK = {"effort": "fast", "calibration_images": 8, "batch_size": 4, "latency": False}
BALANCED = {**QUICK, "effort": "balanced", "gain_steps": 2}
"""The default effort, with few steps."""


def prune_quickly(file: ModelFile, output: object, **options: Any) -> mhacut.PruneResult:
    checkpoint = options.pop("checkpoint", file.path)
    return mhacut.prune(checkpoint, output=output, **{**file.options, **QUICK, **options})


def stated_by(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["mhacut"])


def last_step(path: Path) -> dict[str, Any]:
    return stated_by(path)["history"][-1]
