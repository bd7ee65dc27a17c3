"""What others published on ImageNet without training weights, for ``compare.py`` to print beside its rows.

The standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """One row: of 50,000 validation images, none of them measured here."""

    model: str
    """timm's architecture."""
    method: str
    kept: float
    """FLOPs in percent of the dense model's."""
    top1: float
    dense: float
    """Top-1 of the model that was cut, by the same source."""
    source: str
    note: str = ""


_TOME = "README of facebookresearch/ToMe; FLOPs counted here"
_TOME_PAPER, _DIFFRATE = "arXiv 2210.09461", "README of OpenGVLab/DiffRate"
_CIS = "README of kukwang/Token-Merging-with-Class-Importance-Score; FLOPs counted here"
_CORP = "README of BOX-LEO/CORP of May 2026"
_SNAP = "results/in1k.md of WalterSimoncini/SnapViT; FLOPs counted here"
_TINY, _SMALL, _BASE = (f"deit_{size}_patch16_224" for size in ("tiny", "small", "base"))
_KNN = "k-NN, no classifier"
_TRAINED = "rates learned on ImageNet"
_STEPS = (90.5, 80.5, 70.6, 60.6, 50.7, 40.7)
"""Percent that SnapViT's six steps keep of a ViT-B: .15 to .65 of hidden channels go, 0 to .5 of heads."""

ROWS = (
    Published(_TINY, "CORP, q/k", 78.0, 64.25, 72.2, _CORP),
    Published(_TINY, "CORP, q/k and MLP", 54.0, 41.36, 72.2, _CORP),
    Published(_TINY, "ToMeCIS", 58.6, 70.59, 72.13, _CIS),
    Published(_TINY, "ToMeCIS", 49.8, 69.01, 72.13, _CIS),
    Published(_SMALL, "CORP, q/k", 84.0, 72.49, 79.8, _CORP),
    Published(_SMALL, "CORP, q/k and MLP", 56.0, 58.37, 79.8, _CORP),
    Published(_SMALL, "DiffRate", 63.2, 79.54, 79.8, _DIFFRATE, _TRAINED),
    Published(_SMALL, "Token Transforming", 60.0, 79.7, 79.8, "abstract of arXiv 2506.05709", ".1 lost"),
    Published(_SMALL, "ToMe", 58.8, 79.35, 79.8, _TOME_PAPER),
    Published(_BASE, "CORP, q/k", 87.5, 80.80, 81.74, _CORP),
    Published(_BASE, "CORP, q/k and MLP", 57.0, 72.00, 81.74, _CORP, "README has the same for MLP alone"),
    Published(_BASE, "DiffRate", 65.6, 81.50, 81.8, _DIFFRATE, _TRAINED),
    *(
        Published(_BASE, "SnapViT", kept, top1, 81.68, _SNAP, _KNN)
        for kept, top1 in zip(_STEPS, (81.48, 79.45, 76.06, 69.48, 58.90, 42.64), strict=True)
    ),
    Published("vit_small_patch16_224", "ToMe", 58.8, 79.30, 81.41, _TOME),
    Published("vit_base_patch16_224", "ToMe", 59.0, 82.60, 84.57, _TOME),
    Published("vit_large_patch16_224", "ToMe", 56.4, 84.26, 85.82, _TOME),
    *(
        Published("vit_base_patch16_224", "SnapViT", kept, top1, 77.95, _SNAP, _KNN)
        for kept, top1 in zip(_STEPS, (77.17, 70.65, 58.93, 39.37, 22.22, 16.49), strict=True)
    ),
)


def published(checkpoint: str, model: str | None) -> list[Published]:
    """Rows of the architecture that ``timm:NAME.WEIGHTS``, or ``model``, names."""
    name = model or checkpoint.removeprefix("timm:").partition(".")[0]
    return [row for row in ROWS if row.model == name]


def budgets(rows: Sequence[Published]) -> list[float]:
    """Percents at which others published, and half, the largest first."""
    return sorted({50.0, *(float(round(row.kept)) for row in rows if row.note != _KNN)}, reverse=True)


def as_rows(rows: Sequence[Published]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def as_markdown(rows: Sequence[Published]) -> str:
    """A table, with the change of top-1."""
    lines = ["| published | FLOPs | top-1 | change | source |", "|---|---|---|---|---|"]
    for row in rows:
        source = f"{row.source} ({row.note})" if row.note else row.source
        cells = [row.method, f"{row.kept:g} %", f"{row.top1:.2f}", f"{row.top1 - row.dense:+.2f}", source]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
