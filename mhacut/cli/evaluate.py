"""``mhacut evaluate``."""

from __future__ import annotations

from mhacut.cli.console import Console
from mhacut.cli.flags import command
from mhacut.options import EvaluateOptions


@command(EvaluateOptions)
def evaluate(options: EvaluateOptions, console: Console) -> None:
    """Measure the accuracy of CHECKPOINT, dense or slim, on labelled images.

    Images are prepared as the file says; flags override that.

    Example: mhacut evaluate vit-2.0G.safetensors --data-dir images/
    """
