"""``mhacut inspect``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mhacut._version import __version__
from mhacut.cli.console import Console, safe, table
from mhacut.cli.evaluate import preprocessing_line
from mhacut.cli.flags import command
from mhacut.options import InspectOptions
from mhacut.quantity import format_flops

if TYPE_CHECKING:
    from mhacut.inspection import Inspection, LayerReport

_KINDS = ("qk", "v", "hidden")


@command(InspectOptions)
def inspect(options: InspectOptions, console: Console) -> None:
    """Show what can be cut in CHECKPOINT: per layer its heads, widths and FLOPs.

    Widths are channels per head; in a slim file, before and after the cut.

    Example: mhacut inspect vit.safetensors
    """
    from mhacut.checkpoint.load import read_as_told
    from mhacut.inspection import inspect_model

    console.start("reading")
    loaded = read_as_told(options, console)
    inspection = inspect_model(loaded)
    console.result(_text(inspection), _document(inspection))


def _text(inspection: Inspection) -> str:
    rows = [["layer", "heads", *_KINDS, "FLOPs", "share"]]
    for layer in inspection.layers:
        heads = "" if layer.heads is None else str(layer.heads)
        widths = [_width(layer, kind) for kind in _KINDS]
        rows.append(
            [safe(layer.name), heads, *widths, format_flops(layer.flops), f"{100 * layer.share:.1f}%"]
        )
    rest = inspection.flops - sum(layer.flops for layer in inspection.layers)
    rows.append(["the rest", "", "", "", "", format_flops(rest), f"{100 * rest / inspection.flops:.1f}%"])
    channels, height, width = inspection.input_size
    classes = f"{inspection.classes} classes" if inspection.classes else "no classifier"
    lines = [
        table(rows),
        "",
        f"{safe(inspection.architecture)}, {channels}x{height}x{width}, {classes}: "
        f"{format_flops(inspection.flops)} FLOPs, {format_flops(inspection.parameters)} parameters, "
        f"{' and '.join(inspection.dtypes)}",
        f"preprocessing: {preprocessing_line(inspection.preprocessing)}",
    ]
    lines += [f"left whole: {safe(line)}" for line in inspection.left_whole]
    lines += [f"step {number}: {_step(entry)}" for number, entry in enumerate(inspection.history, start=1)]
    return "\n".join(lines)


def _width(layer: LayerReport, kind: Any) -> str:
    if kind in layer.left_whole:
        return "whole"
    if kind not in layer.widths:
        return ""
    width = layer.widths[kind]
    return str(width.now) if width.now == width.dense else f"{width.dense} -> {width.now}"


def _step(entry: Mapping[str, Any]) -> str:
    """One command of a slim file's history; the file may hold anything there."""

    def flops(name: str) -> str:
        value = entry.get(name)
        held = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e18
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


def _document(inspection: Inspection) -> dict[str, Any]:
    return {
        "command": "inspect",
        "mhacut": __version__,
        "checkpoint": inspection.source,
        "architecture": inspection.architecture,
        "input_size": list(inspection.input_size),
        "classes": inspection.classes,
        "flops": inspection.flops,
        "parameters": inspection.parameters,
        "dtypes": list(inspection.dtypes),
        "layers": [
            {
                "layer": layer.name,
                "module": layer.module,
                "heads": layer.heads,
                "widths": {
                    kind: {"now": width.now, "dense": width.dense} for kind, width in layer.widths.items()
                },
                "left_whole": dict(layer.left_whole),
                "flops": layer.flops,
                "share": layer.share,
            }
            for layer in inspection.layers
        ],
        "left_whole": list(inspection.left_whole),
        "preprocessing": inspection.preprocessing.to_json(),
        "history": [dict(entry) for entry in inspection.history],
    }
