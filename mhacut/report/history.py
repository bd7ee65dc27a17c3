"""Description of a slim file's history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mhacut.budget import format_flops
from mhacut.limits import is_number
from mhacut.text import safe

_LARGEST = 1e18
_MOST_TARGETS = 8


def step(entry: Mapping[str, Any]) -> str:
    """Return one line about one command of a slim file's history, whose values are untrusted."""
    command, version = _text(entry.get("command")), _text(_version(entry))
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
    return f"{command} {figures}, seed {seed}, mhacut {version}, on {data}"


def _targets(entry: Mapping[str, Any]) -> str:
    """Return the budget, and other targets where there are any."""
    budget = [f"budget {_flops(entry['budget'])}"] if "budget" in entry else []
    stated = entry.get("targets")
    targets = stated[:_MOST_TARGETS] if isinstance(stated, list) else []
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


def _version(entry: Mapping[str, Any]) -> object:
    versions = entry.get("versions")
    return versions.get("mhacut") if isinstance(versions, Mapping) else None


def _flops(value: Any) -> str:
    return format_flops(float(value)) if is_number(value) and 0 <= value < _LARGEST else "?"


def _text(value: object) -> str:
    return safe("?" if value is None else f"{value!s:.100}")
