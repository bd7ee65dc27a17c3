"""Cut channels out of the multi-head attention and the MLPs of trained vision transformers.

import mhacut

result = mhacut.prune("vit.safetensors", flops="2.0G", data_dir="images/")
model = mhacut.load_model(result.output)
"""

from __future__ import annotations

# No other imports: until mhacut.cli.main() runs, Ctrl-C ends in Python's own traceback.
from mhacut._timm_hook import register_with_timm
from mhacut._version import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from mhacut.checkpoint.load import load_model
    from mhacut.checkpoint.write import save_model
    from mhacut.commands.bench import BenchResult, bench
    from mhacut.commands.evaluate import EvaluateResult, evaluate
    from mhacut.commands.export import ExportResult, export
    from mhacut.commands.finetune import finetune
    from mhacut.commands.inspect import InspectResult, inspect
    from mhacut.commands.prune import prune, prune_many
    from mhacut.commands.prune_result import PruneResult, PruneResults
    from mhacut.errors import (
        BudgetError,
        CheckpointError,
        DataError,
        Interrupted,
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
    "InspectResult",
    "Interrupted",
    "MhacutError",
    "OutputError",
    "Plan",
    "PlanError",
    "PruneResult",
    "PruneResults",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
    "bench",
    "evaluate",
    "export",
    "finetune",
    "inspect",
    "load_model",
    "prune",
    "prune_many",
    "save_model",
]

_HOMES = {
    "BenchResult": "mhacut.commands.bench",
    "BudgetError": "mhacut.errors",
    "CheckpointError": "mhacut.errors",
    "DataError": "mhacut.errors",
    "EvaluateResult": "mhacut.commands.evaluate",
    "ExportResult": "mhacut.commands.export",
    "FinetuneResult": "mhacut.finetuning.result",
    "InspectResult": "mhacut.commands.inspect",
    "Interrupted": "mhacut.errors",
    "MhacutError": "mhacut.errors",
    "OutputError": "mhacut.errors",
    "Plan": "mhacut.plan",
    "PlanError": "mhacut.errors",
    "PruneResult": "mhacut.commands.prune_result",
    "PruneResults": "mhacut.commands.prune_result",
    "UnsupportedModelError": "mhacut.errors",
    "UsageError": "mhacut.errors",
    "bench": "mhacut.commands.bench",
    "evaluate": "mhacut.commands.evaluate",
    "export": "mhacut.commands.export",
    "finetune": "mhacut.commands.finetune",
    "inspect": "mhacut.commands.inspect",
    "load_model": "mhacut.checkpoint.load",
    "prune": "mhacut.commands.prune",
    "prune_many": "mhacut.commands.prune",
    "save_model": "mhacut.checkpoint.write",
}
"""Module of each name that is imported when it is first asked for."""

register_with_timm()  # timm.create_model("flatten_swin_tiny_224")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import what is first used: torch and timm take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mhacut' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
