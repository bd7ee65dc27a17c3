"""A slim file's history in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mhacut.budget import format_flops
from mhacut.limits import is_number
from mhacut.text import safe


def step(entry: Mapping[str, Any]) -> str:
    """One command of a slim file's history; the file may hold anything there."""

    def flops(name: str) -> str:
        value = entry.get(name)
        held = is_number(value) and 0 <= value < 1e18
        return format_flops(float(value)) if held and value is not None else "?"

    def text(value: object) -> str:
        return safe("?" if value is None else f"{value!s:.100}")

    versions = entry.get("versions")
    version = versions.get("mhacut") if isinstance(versions, Mapping) else None
    if entry.get("command") == "finetune":
        taught = "no teacher" if entry.get("teacher_sha256") is None else "a teacher"
        return (
            f"finetune, {text(entry.get('steps'))} steps of {text(entry.get('images_per_step'))} images, "
            f"{taught}, seed {text(entry.get('seed'))}, mhacut {text(version)}, on {text(entry.get('data'))}"
        )
    if "flops_before" not in entry:
        return f"{text(entry.get('command'))}, mhacut {text(version)}"
    return (
        f"{text(entry.get('command'))} {flops('flops_before')} -> {flops('flops_after')} FLOPs "
        f"(budget {flops('budget')}), seed {text(entry.get('seed'))}, mhacut {text(version)}, "
        f"on {text(entry.get('data'))}"
    )
