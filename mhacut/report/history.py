"""A slim file's history: a line about each command, and the sensitivity curves of the last cut.

The history is untrusted: it is JSON that anyone may have written.
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
from mhacut.pruning.preserve import Measure
from mhacut.text import safe

_LARGEST = 1e18


def step(entry: Mapping[str, Any]) -> str:
    """Return one line about one command of a slim file's history, whose values are untrusted."""
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
    """Return the budget, and other targets where there are any."""
    budget = [f"budget {_flops(entry['budget'])}"] if "budget" in entry else []
    stated = entry.get("targets")
    targets = stated[:8] if isinstance(stated, list) else []  # mhacut writes at most five
    others = [
        f"{_text(target.get('target'))} {_text(target.get('asked'))}"
        for target in targets
        if isinstance(target, Mapping) and target.get("target") != "flops"
    ]
    return ", ".join(budget + others) or "budget ?"


def _preserving(preserved: object) -> str:
    """Return a text about what was preserved; empty if the entry states nothing, as for the answers."""
    if not isinstance(preserved, Mapping):
        return ""
    what, layers = preserved.get("what"), preserved.get("layers")
    if what == "layers" and isinstance(layers, list):
        what = ", ".join(map(str, layers))
    return f", preserving {_text(what)}"


def _fidelity(stated: object) -> str:
    """Return the divergence that was measured, and of which images; empty if the entry states none."""
    value = stated.get("divergence") if isinstance(stated, Mapping) else None
    if not isinstance(stated, Mapping) or not is_number(value) or not 0 <= value < _LARGEST:
        return ""
    return f", divergence {value:.2g} on {_text(stated.get('images'))} {_text(stated.get('sample'))}"


def _flops(value: Any) -> str:
    return format_flops(float(value)) if is_number(value) and 0 <= value < _LARGEST else "?"


def _text(value: object) -> str:
    # Cut off, because a value can be of any length.
    return safe("?" if value is None else f"{value!s:.100}")


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
    """
    chosen = plan.widths()
    documents = []
    for (layer, kind), curve in curves.items():
        if not all(map(math.isfinite, curve.values())):
            continue  # JSON has no infinity, and its readers would refuse the file
        # A few points: the history lies in the header of the file, which every reader parses.
        widths = sorted({*sampled_widths(sorted(curve)), chosen[layer, kind]})
        points = [[width, float(f"{curve[width]:.4g}")] for width in widths]
        documents.append({"layer": layer, "kind": kind, "points": points, "chosen": chosen[layer, kind]})
    return documents


def stored_curves(history: Iterable[Mapping[str, Any]]) -> StoredCurves:
    """Return the curves of the last cut in a slim file's history, without those that make no sense."""
    last = StoredCurves()
    for entry in history:
        listed, budget = entry.get("curves"), entry.get("budget")
        if isinstance(listed, list):
            curves = tuple(filter(None, map(_curve, listed)))
            # Later curves replace earlier ones, whose widths the file no longer has.
            known = int(budget) if is_number(budget) and 0 <= budget < _LARGEST else None
            # Files whose cut preserved answers do not state what it was chosen by.
            stated = entry.get("divergence_of", None if "preserved" in entry else "answers")
            measure = next((measure for measure in get_args(Measure) if measure == stated), None)
            last = StoredCurves(curves, known, measure) if curves else StoredCurves()
    return last


def _curve(entry: Any) -> StoredCurve | None:
    try:
        # int and float refuse what is no number; what they take of a hostile file is bounded below.
        points = tuple((int(width), float(error)) for width, error in entry["points"])
        curve = StoredCurve(str(entry["layer"]), str(entry["kind"]), points, int(entry["chosen"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    makes_sense = points and curve.kind in UNIT_KINDS and 0 < points[-1][0] < _LARGEST
    return curve if makes_sense and all(0 <= error < _LARGEST for _, error in points) else None
