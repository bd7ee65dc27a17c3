"""``mhacut inspect``."""

from __future__ import annotations

from mhacut.cli.console import Console
from mhacut.cli.flags import command
from mhacut.options import InspectOptions


@command(InspectOptions)
def inspect(options: InspectOptions, console: Console) -> None:
    """Show what can be cut in CHECKPOINT: per layer its heads, widths and FLOPs.

    Example: mhacut inspect vit.safetensors
    """
