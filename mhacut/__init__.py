"""Prune trained vision transformers: remove channels of attention and MLPs, and merge tokens.

import mhacut

result = mhacut.prune("vit.safetensors", flops="2.0G", data_dir="images/")
model = mhacut.load_model(result.output)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mhacut._timm_hook import register_with_timm
from mhacut._version import __version__

if TYPE_CHECKING:
    from mhacut.checkpoint.load import load_model
    from mhacut.checkpoint.part_file import apply_pruned, load_pruned, save_pruned
    from mhacut.checkpoint.write import save_model
    from mhacut.commands.bench import BenchResult, bench
    from mhacut.commands.evaluate import EvaluateResult, evaluate
    from mhacut.commands.export import ExportResult, export
    from mhacut.commands.finetune import finetune
    from mhacut.commands.inspect import InspectResult, inspect
    from mhacut.commands.prune import prune, prune_many
    from mhacut.commands.prune_in_place import InPlaceResult, prune_
    from mhacut.commands.prune_result import PruneResult, PruneResults
    from mhacut.errors import (
        BudgetError,
        CheckpointError,
        DataError,
        MhacutError,
        OutputError,
        PlanError,
        UnsupportedModelError,
        UsageError,
    )
    from mhacut.finetuning.result import FinetuneResult
    from mhacut.plan import Plan

__all__ = [
    "BenchResult",
    "BudgetError",
    "CheckpointError",
    "DataError",
    "EvaluateResult",
    "ExportResult",
    "FinetuneResult",
    "InPlaceResult",
    "InspectResult",
    "MhacutError",
    "OutputError",
    "Plan",
    "PlanError",
    "PruneResult",
    "PruneResults",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
    "apply_pruned",
    "bench",
    "evaluate",
    "export",
    "finetune",
    "inspect",
    "load_model",
    "load_pruned",
    "prune",
    "prune_",
    "prune_many",
    "save_model",
    "save_pruned",
]

_NAMES = {
    "mhacut.checkpoint.load": ["load_model"],
    "mhacut.checkpoint.part_file": ["apply_pruned", "load_pruned", "save_pruned"],
    "mhacut.checkpoint.write": ["save_model"],
    "mhacut.commands.bench": ["BenchResult", "bench"],
    "mhacut.commands.evaluate": ["EvaluateResult", "evaluate"],
    "mhacut.commands.export": ["ExportResult", "export"],
    "mhacut.commands.finetune": ["finetune"],
    "mhacut.commands.inspect": ["InspectResult", "inspect"],
    "mhacut.commands.prune": ["prune", "prune_many"],
    "mhacut.commands.prune_in_place": ["InPlaceResult", "prune_"],
    "mhacut.commands.prune_result": ["PruneResult", "PruneResults"],
    "mhacut.errors": [name for name in __all__ if name.endswith("Error")],
    "mhacut.finetuning.result": ["FinetuneResult"],
    "mhacut.plan": ["Plan"],
}
"""Public names by module, imported on first use."""
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

register_with_timm()  # for timm.create_model("flatten_swin_tiny_224")


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Import a public name on first use, because torch and timm take seconds to import."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mhacut' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
