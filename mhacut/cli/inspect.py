"""``mhacut inspect``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mhacut.budget import format_flops
from mhacut.cli.flags import command
from mhacut.cli.running import Console
from mhacut.options.measure import InspectOptions
from mhacut.runtime.files import check_outputs
from mhacut.text import ranges, safe, safe_table

if TYPE_CHECKING:
    from mhacut.commands.inspect import InspectResult
    from mhacut.inspection.layers import Inspection, LayerReport


@command(
    InspectOptions,
    usual=("layer", "heads", "sort", "compare", "data_dir", "html", "overwrite", "model", "device"),
    check_outputs=lambda given: check_outputs(
        (given.html,), overwrite=given.overwrite, input_paths=given.files_read()
    ),
)
def inspect(options: InspectOptions, console: Console) -> None:
    """Show layers, costs and redundancy of CHECKPOINT.

    Widths are channels per head. The redundancy of heads comes from the weights, or from images with
    --data-dir.

    Examples:
      mhacut inspect vit.safetensors
      mhacut inspect vit.safetensors --layer 'blocks.1*.attn'
      mhacut inspect vit-50pct.safetensors --compare vit.safetensors
    """
    from mhacut.commands.inspect import run_inspect

    result = run_inspect(options, console)
    by_head = options.heads or options.layer is not None
    document = {**vars(result.inspection), "verdict": result.verdict, "layers": result.chosen}
    document |= {"comparison": result.comparison, "written": result.written}
    console.result(_text(result, by_head=by_head), document)


def _text(result: InspectResult, *, by_head: bool) -> str:
    from mhacut.report.tables import COMPARISON_NOTES, comparison_rows, layer_rows

    parts = [safe(result.verdict)]
    for attends in (True, False):
        layers = [layer for layer in result.chosen if (layer.heads is not None) == attends]
        if layers:
            parts.append(safe_table(layer_rows(layers, by_head=by_head)))
    if by_head and (kept := list(_kept_channels(result.chosen))):
        parts.append("\n".join(kept))
    if (comparison := result.comparison) is not None:
        by_name = {layer.name: layer for layer in comparison.layers}
        rows = comparison_rows([by_name[layer.name] for layer in result.chosen])
        (dense, slim), (before, after) = comparison.flops, comparison.parameters
        notes = [
            f"compared with {comparison.dense}: {format_flops(slim)} of {format_flops(dense)} FLOPs, "
            f"{format_flops(after)} of {format_flops(before)} parameters",
            f"outputs on {comparison.data}: {comparison.outputs()}",
            *COMPARISON_NOTES,
        ]
        parts.append(safe_table(rows, notes))
    parts.append("\n".join(map(safe, _about(result.inspection))))
    parts += [f"saved {safe(path)}" for path in result.written]
    return "\n\n".join(parts)


def _kept_channels(layers: Sequence[LayerReport]) -> Iterator[str]:
    """Yield 1 line of text per head of a slim file, with the head's remaining channels."""
    for layer in layers:
        for kind, unit in layer.units.items():
            if kind == "hidden":
                continue  # hundreds of channels
            for head, kept in enumerate(unit.kept or ()):
                channels = "principal channels" if unit.basis == "principal" else "channels"
                removed = ranges(sorted(set(range(unit.dense)) - set(kept)))
                yield (
                    f"{safe(layer.name)}, {kind} of head {head}: kept {channels} {ranges(kept)}; "
                    f"removed {removed}"
                )


def _about(inspection: Inspection) -> list[str]:
    from mhacut.inspection.layers import about_sizes
    from mhacut.report.history import step
    from mhacut.report.tables import LAYER_NOTES

    channels, height, width = inspection.input_size
    classes = f"{inspection.classes} classes" if inspection.classes else "no classifier"
    lines = [
        f"{inspection.architecture}, {channels}x{height}x{width}, {classes}: "
        f"{format_flops(inspection.flops)} FLOPs, {format_flops(inspection.parameters)} parameters, "
        f"{' and '.join(inspection.dtypes)}",
    ]
    lines += about_sizes(inspection)
    if inspection.judged_by is not None:
        lines += [*LAYER_NOTES, f"computed from: {inspection.judged_by}"]
    lines.append(f"preprocessing: {inspection.provenance.describe(inspection.preprocessing)}")
    lines += [f"not prunable: {line}" for line in inspection.not_prunable]
    lines += [f"step {number}: {step(entry)}" for number, entry in enumerate(inspection.history, start=1)]
    return lines
