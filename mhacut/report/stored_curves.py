"""Sensitivity curves of a cut, as a slim file's history keeps them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

from mhacut.limits import is_int, is_number
from mhacut.plan import UNIT_KINDS, Plan, UnitKey
from mhacut.pruning.curves import Curve, sampled_widths
from mhacut.pruning.preserve import Measure

# Bounds on what is read: the file is untrusted.
_MOST_CURVES = 4096
_MOST_POINTS = 64
_LONGEST_NAME = 256
_LARGEST_WIDTH = 10**6
_LARGEST_NUMBER = 1e18


@dataclass(frozen=True)
class StoredCurve:
    """Sensitivity curve of one unit, and the width that it was cut to."""

    layer: str
    kind: str
    points: tuple[tuple[int, float], ...]
    """Widths, ascending, each with its estimated divergence; the last is that before the cut."""
    chosen: int
    """Width that was chosen."""


@dataclass(frozen=True)
class StoredCurves:
    """Sensitivity curves of one cut."""

    curves: tuple[StoredCurve, ...] = ()
    budget: int | None = None
    """Budget in FLOPs of the cut, where it had one."""
    measure: Measure | None = "answers"
    """Divergence that the curves are of; None where the file does not say."""


def curves_to_json(curves: Mapping[UnitKey, Curve], plan: Plan) -> list[dict[str, Any]]:
    """Return the curves of a search as JSON: a few points each, with four digits.

    Curves with a value that is not finite are left out.

    Args:
        curves: divergence by width, for each unit.
        plan: plan with the widths that were chosen.
    """
    chosen = plan.widths()
    documents = []
    for (layer, kind), curve in curves.items():
        if not all(map(math.isfinite, curve.values())):
            continue  # JSON has no infinity
        widths = sorted({*sampled_widths(sorted(curve)), chosen[layer, kind]})
        points = [[width, float(f"{curve[width]:.4g}")] for width in widths]
        documents.append({"layer": layer, "kind": kind, "points": points, "chosen": chosen[layer, kind]})
    return documents


def stored_curves(history: Iterable[Mapping[str, Any]]) -> StoredCurves:
    """Return the curves of the last cut in a slim file's history.

    The history is untrusted: entries that :func:`curves_to_json` would not have written are left out.
    """
    found = StoredCurves()
    for entry in history:
        listed = entry.get("curves")
        if isinstance(listed, list):
            curves = tuple(filter(None, map(_curve, listed[:_MOST_CURVES])))
            stated: Any = entry.get("budget")
            budget = int(stated) if _is_amount(stated) else None
            found = StoredCurves(curves, budget, _measure(entry)) if curves else StoredCurves()
    return found


def _measure(entry: Mapping[str, Any]) -> Measure | None:
    """Divergence that a cut was judged by; files whose cut preserved answers do not state it."""
    stated = entry.get("divergence_of", None if "preserved" in entry else "answers")
    return next((measure for measure in get_args(Measure) if measure == stated), None)


def _curve(entry: object) -> StoredCurve | None:
    if not isinstance(entry, Mapping):
        return None
    layer, kind, points, chosen = (entry.get(key) for key in ("layer", "kind", "points", "chosen"))
    if not isinstance(layer, str) or len(layer) > _LONGEST_NAME:
        return None
    if kind not in UNIT_KINDS or not _is_width(chosen):
        return None
    if not isinstance(points, list) or not 2 <= len(points) <= _MOST_POINTS:
        return None
    if not all(map(_is_point, points)):
        return None
    read = tuple((int(width), float(nats)) for width, nats in points)
    ascending = all(before[0] < after[0] for before, after in pairwise(read))
    return StoredCurve(layer, str(kind), read, int(str(chosen))) if ascending else None


def _is_point(point: object) -> bool:
    return isinstance(point, list) and len(point) == 2 and _is_width(point[0]) and _is_amount(point[1])


def _is_width(value: Any) -> bool:
    return is_int(value) and 0 < value < _LARGEST_WIDTH


def _is_amount(value: Any) -> bool:
    return is_number(value) and 0 <= value < _LARGEST_NUMBER
