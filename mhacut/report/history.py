"""Display of a slim file's history: a line per command, and the sensitivity curves of the last cut.

A history is untrusted JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from mhacut.budget import format_flops
from mhacut.limits import is_number
from mhacut.plan import UNIT_KINDS, Plan, UnitKey
from mhacut.pruning.curves import Curve, sampled_widths
from mhacut.pruning.preserve import OutputMetric
from mhacut.text import safe

_LARGEST = 1e18


def step(entry: Mapping[str, Any]) -> str:
    """Describe a command in a slim file's history, as a line of text."""
    versions = entry.get("versions")
    version = _text(versions.get("mhacut") if isinstance(versions, Mapping) else None)
    command = _text(entry.get("command"))
    seed, data = _text(entry.get("seed")), _text(entry.get("data"))
    if command == "finetune":
        teacher = "no teacher" if entry.get("teacher_sha256") is None else "a teacher"
        steps, images = _text(entry.get("steps")), _text(entry.get("images_per_step"))
        return (
            f"finetune, {steps} steps of {images} images, {teacher}, seed {seed}, mhacut {version}, on {data}"
        )
    if "flops_before" not in entry:
        return f"{command}, mhacut {version}"
    before, after = (_flops(entry.get(name)) for name in ("flops_before", "flops_after"))
    figures = f"{before} -> {after} FLOPs ({_targets(entry)}){_preserving(entry.get('preserved'))}"
    figures += _fidelity(entry.get("fidelity"))
    options = entry.get("options")
    named = options if isinstance(options, Mapping) else {}
    how = "".join(f"{name} {_text(named[name])}, " for name in ("scope", "effort") if name in named)
    return f"{command} {figures}, {how}seed {seed}, mhacut {version}, on {data}"


def _targets(entry: Mapping[str, Any]) -> str:
    budget = [f"budget {_flops(entry['budget'])}"] if "budget" in entry else []
    stated = entry.get("targets")
    targets = stated[:8] if isinstance(stated, list) else []  # mhacut writes at most 5
    others = [
        f"{_text(target.get('target'))} {_text(target.get('asked'))}"
        for target in targets
        if isinstance(target, Mapping) and target.get("target") != "flops"
    ]
    return ", ".join(budget + others) or "budget ?"


def _preserving(preserved: object) -> str:
    if not isinstance(preserved, Mapping):
        return ""
    what, layers = preserved.get("what"), preserved.get("layers")
    if what == "layers" and isinstance(layers, list):
        what = ", ".join(map(str, layers))
    return f", preserving {_text(what)}"


def _fidelity(stated: object) -> str:
    value = stated.get("divergence") if isinstance(stated, Mapping) else None
    if not isinstance(stated, Mapping) or not is_number(value) or not 0 <= value < _LARGEST:
        return ""
    return f", divergence {value:.2g} on {_text(stated.get('images'))} {_text(stated.get('sample'))}"


def _flops(value: Any) -> str:
    return format_flops(float(value)) if is_number(value) and 0 <= value < _LARGEST else "?"


def _text(value: object) -> str:
    return safe("?" if value is None else f"{value!s:.100}")  # a value can be very long


@dataclass(frozen=True)
class StoredCurve:
    """Divergence as a function of the width of a layer, read from a slim file."""

    layer: str
    kind: str
    points: tuple[tuple[int, float], ...]
    """Pairs of (width, estimated divergence) by ascending width. The last width is the width before
    pruning."""
    chosen: int
    """Width after pruning."""


@dataclass(frozen=True)
class StoredCurves:
    """Sensitivity curves of all layers in a pruning run, read from a slim file."""

    curves: tuple[StoredCurve, ...] = ()
    budget: int | None = None
    """FLOPs budget of the pruning run; None if unknown."""
    metric: OutputMetric | None = "answers"
    """Metric of the divergence in the curves; None if the file does not name a metric."""


def curves_to_json(curves: Mapping[UnitKey, Curve], plan: Plan) -> list[dict[str, Any]]:
    """Return the sensitivity curves of a search as JSON: few points per curve, with 4 digits."""
    chosen = plan.widths()
    documents = []
    for (layer, kind), curve in curves.items():
        if not all(map(math.isfinite, curve.values())):
            continue  # JSON has no infinity
        # Few points, because every reader of the file parses its header, which has the history.
        widths = sorted({*sampled_widths(sorted(curve)), chosen[layer, kind]})
        points = [[width, float(f"{curve[width]:.4g}")] for width in widths]
        documents.append({"layer": layer, "kind": kind, "points": points, "chosen": chosen[layer, kind]})
    return documents


def stored_curves(history: Iterable[Mapping[str, Any]]) -> StoredCurves:
    last = StoredCurves()
    for entry in history:
        listed, budget = entry.get("curves"), entry.get("budget")
        if isinstance(listed, list):
            curves = tuple(filter(None, map(_curve, listed)))
            # Later curves replace earlier curves, whose widths are no longer in the file.
            known = int(budget) if is_number(budget) and 0 <= budget < _LARGEST else None
            # The metric is only in files of cuts that preserved something other than logits.
            stated = entry.get("divergence_of", None if "preserved" in entry else "answers")
            metric = next((metric for metric in get_args(OutputMetric) if metric == stated), None)
            last = StoredCurves(curves, known, metric) if curves else StoredCurves()
    return last


def _curve(entry: Any) -> StoredCurve | None:
    try:
        # int and float refuse other types. The values are checked below.
        points = tuple((int(width), float(error)) for width, error in entry["points"])
        curve = StoredCurve(str(entry["layer"]), str(entry["kind"]), points, int(entry["chosen"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    makes_sense = points and curve.kind in UNIT_KINDS and 0 < points[-1][0] < _LARGEST
    return curve if makes_sense and all(0 <= error < _LARGEST for _, error in points) else None
