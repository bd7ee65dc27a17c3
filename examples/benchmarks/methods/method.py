"""What a column of the comparison is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Sees = Literal["nothing", "images", "labelled images"]


@dataclass(frozen=True)
class Method:
    """One column of the comparison."""

    name: str
    """What ``--methods`` matches."""
    title: str
    """For readers."""
    sees: Sees
    """What it looks at beside the weights."""
    module: str
    """Module of this package that does it; empty for ``mhacut prune``, which is run as a command."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """For the module's ``prune``; for mhacut, ``flags`` of the command."""
    default: bool = True
    """Whether a comparison that names no methods has it."""
