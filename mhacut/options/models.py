"""Options of ``mhacut models``."""

from __future__ import annotations

from dataclasses import dataclass

from mhacut.options.option import Options, option


@dataclass(frozen=True, kw_only=True)
class ModelsOptions(Options):
    """Options of ``mhacut models``."""

    pattern: str = option(
        "*",
        "Pattern of names, as for timm.list_models; all models by default, which takes minutes.",
        panel="Arguments",
        metavar="PATTERN",
    )
    refused: bool = option(False, "List only models that cannot be pruned, with the reason.", panel="Models")
