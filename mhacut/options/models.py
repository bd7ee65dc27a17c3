"""Options of ``mhacut models``."""

from __future__ import annotations

from dataclasses import dataclass

from mhacut.options.base import Flat


@dataclass(frozen=True)
class ModelsOptions(Flat):
    """Everything ``mhacut models`` can be told."""

    pattern: str = "*"
    """Of names, as for ``timm.list_models``."""
    refused: bool = False
    """Only those that cannot be cut."""
