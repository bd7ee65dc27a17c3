"""What a report is made from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mhacut.inspection.compare import Comparison
from mhacut.inspection.layers import Inspection, LayerReport
from mhacut.limits import is_int, is_number
from mhacut.plan import UNIT_KINDS, Plan
from mhacut.pruning.curves import Curve, sampled_widths
from mhacut.pruning.indicators import SearchStep
from mhacut.surgery.find import UnitKey

_MOST_CURVES = 4096
_MOST_POINTS = 64


@dataclass(frozen=True)
class StoredCurve:
    """How the answer's error grows as one unit alone gets narrower, and where the cut was made."""

    layer: str
    kind: str
    points: tuple[tuple[int, float], ...]
    """Width, ascending, and estimated KL divergence in nats; the last width is that before the cut."""
    chosen: int
    """The width that the budget bought."""


@dataclass(frozen=True)
class Contents:
    """Everything on the page."""

    inspection: Inspection
    verdict: str
    layers: tuple[LayerReport, ...]
    """Those to show, in the order to show them."""
    comparison: Comparison | None = None
    curves: tuple[StoredCurve, ...] = ()
    budget: int | None = None
    """In FLOPs, of the cut that the curves belong to."""
    steps: tuple[SearchStep, ...] = ()
    """Of the search, where indicators were trained."""
    figures: tuple[tuple[str, str, str], ...] = ()
    """What was measured of the run: a name, before and after."""


def curves_to_json(curves: Mapping[UnitKey, Curve], plan: Plan) -> list[dict[str, Any]]:
    """The curves of a search as a slim file's history keeps them: a few points each, four digits."""
    chosen = plan.widths()
    told = []
    for (layer, kind), curve in curves.items():
        if not all(map(math.isfinite, curve.values())):
            continue  # JSON has no infinity, and such a curve says nothing
        widths = sorted({*sampled_widths(sorted(curve)), chosen[layer, kind]})
        points = [[width, float(f"{curve[width]:.4g}")] for width in widths]
        told.append({"layer": layer, "kind": kind, "points": points, "chosen": chosen[layer, kind]})
    return told


def stored_curves(history: Iterable[Mapping[str, Any]]) -> tuple[tuple[StoredCurve, ...], int | None]:
    """The curves of the last cut in a slim file's history, and its budget.

    The history is anyone's text: entries that are not what :func:`curves_to_json` writes are left out.
    """
    found: tuple[StoredCurve, ...] = ()
    budget = None
    for entry in history:
        listed = entry.get("curves")
        if isinstance(listed, list):
            found = tuple(filter(None, map(_curve, listed[:_MOST_CURVES])))
            stated: Any = entry.get("budget")
            budget = int(stated) if _is_finite(stated) and stated >= 0 else None
    return found, budget if found else None


def _curve(entry: object) -> StoredCurve | None:
    if not isinstance(entry, Mapping):
        return None
    layer, kind, points, chosen = (entry.get(key) for key in ("layer", "kind", "points", "chosen"))
    if not isinstance(layer, str) or len(layer) > 256 or kind not in UNIT_KINDS or not _is_width(chosen):
        return None
    if not isinstance(points, list) or not 2 <= len(points) <= _MOST_POINTS:
        return None
    if not all(map(_is_point, points)):
        return None
    read = tuple((int(width), float(nats)) for width, nats in points)
    rising = all(before[0] < after[0] for before, after in pairwise(read))
    return StoredCurve(layer, str(kind), read, int(str(chosen))) if rising else None


def _is_point(point: object) -> bool:
    return (
        isinstance(point, list)
        and len(point) == 2
        and _is_width(point[0])
        and _is_finite(point[1])
        and point[1] >= 0
    )


def _is_width(value: object) -> bool:
    return is_int(value) and 0 < value < 10**6


def _is_finite(value: Any) -> bool:
    return is_number(value) and abs(value) < 1e18 and math.isfinite(value)
