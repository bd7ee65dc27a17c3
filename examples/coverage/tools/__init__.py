"""The tools that are laid beside each other: each a module with ``cut``, ``save`` and ``load``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass
class Done:
    """What a tool made of a model."""

    model: nn.Module
    mode: str
    """What was cut: ``inner``, ``inner and embedding``, ``MLP``."""
    masked: Callable[[nn.Module], Callable[..., Any]] | None
    """From the dense model to one that gives what the slim model should: removed channels at zero."""
    told: str = ""
    """What the tool left whole, and why; or what was tried first."""
    silent: bool = False
    """Whether the tool left attention whole without a word."""
    seconds: float | None = None
    """What the cut took, where that is not all that was tried."""
    kept: Any = None
    """What ``save`` needs beside the model."""
