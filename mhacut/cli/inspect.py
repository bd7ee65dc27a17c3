"""``mhacut inspect``."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mhacut.budget import format_flops
from mhacut.cli.flags import command
from mhacut.cli.running import Console
from mhacut.options.inspect import InspectOptions
from mhacut.runtime.files import check_outputs
from mhacut.text import ranges, safe, table

if TYPE_CHECKING:
    from mhacut.commands.inspect import InspectResult
    from mhacut.inspection.compare import Comparison
    from mhacut.inspection.layers import HeadFindings, Inspection, LayerReport, UnitReport

_WIDTH = 80


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

    heads = options.heads or options.layer is not None
    result = run_inspect(options, console)
    console.result(_text(result, heads=heads), _document(result))


def _text(result: InspectResult, *, heads: bool) -> str:
    inspection = result.inspection
    parts = ["\n".join(_filled(safe(result.verdict), ""))]
    attention = [layer for layer in result.chosen if layer.heads is not None]
    mlps = [layer for layer in result.chosen if layer.heads is None]
    if heads:
        parts += [_layer(layer) for layer in attention]
    elif attention:
        parts.append(_attention_table(attention, judged=inspection.judged_by is not None))
    if mlps:
        parts.append(_mlp_table(mlps))
    if result.comparison is not None:
        parts.append(_comparison(result.comparison, [layer.name for layer in result.chosen]))
    parts.append("\n".join(line for note in _about(inspection, heads) for line in _filled(note, "  ")))
    parts += [f"saved {safe(path)}" for path in result.written]
    return "\n\n".join(parts)


def _attention_table(layers: Sequence[LayerReport], *, judged: bool) -> str:
    scores = ["sim", "r99"] if judged else []
    mlps = (
        ["hidden"] if any("hidden" in layer.units for layer in layers) else []
    )  # blocks with attention and MLP in one module
    rows = [["attention", "heads", "qk", *scores, "v", *scores, *mlps, "FLOPs", "params"]]
    for layer in layers:
        cells = [safe(layer.name), str(layer.heads)]
        for kind in ("qk", "v"):
            cells += [_width(layer, kind), *(_means(layer, kind) if judged else [])]
        cells += [_width(layer, kind) for kind in mlps]
        rows.append([*cells, _percent(layer.share), _percent(layer.parameter_share)])
    return table(rows)


def _mlp_table(layers: Sequence[LayerReport]) -> str:
    rows = [["MLP", "hidden", "FLOPs", "params"]]
    for layer in layers:
        shares = [_percent(layer.share), _percent(layer.parameter_share)]
        rows.append([safe(layer.name), _width(layer, "hidden"), *shares])
    return table(rows)


def _layer(layer: LayerReport) -> str:
    """Format an attention layer, one row per head."""
    heads = layer.heads or 1
    share = f"{_percent(layer.share)} of FLOPs, {_percent(layer.parameter_share)} of parameters"
    title = f"{safe(layer.name)} ({layer.module}), {heads} heads: {share}"
    units = [layer.units[kind] for kind in ("qk", "v") if kind in layer.units]
    judged = any(unit.heads for unit in units)
    scores = ["sim", "r90", "r99"] if judged else []
    rows = [["  head", "qk", *scores, "v", *scores, "FLOPs", "params"]]
    for head in range(heads):
        cells = [f"  {head}"]
        for kind in ("qk", "v"):
            unit = layer.units.get(kind)
            cells.append("" if unit is not None and head >= unit.head_count else _width(layer, kind))
            if judged:
                known = unit is not None and head < len(unit.heads)
                cells += _findings(unit.heads[head]) if unit is not None and known else ["", "", ""]
        rows.append([*cells, _percent(layer.share / heads), _percent(layer.parameter_share / heads)])
    lines = [*_filled(title, "  "), table(rows)]
    for unit in units:
        lines += _channels(unit)
    return "\n".join(lines)


def _channels(unit: UnitReport) -> list[str]:
    """List the kept and removed channels of a slim file, one line per head."""
    lines = []
    if unit.kept is not None:
        basis = "principal" if unit.basis == "principal" else "original"
        lines.append(f"  {unit.kind}: of {unit.dense} {basis} channels, kept (removed)")
        for head, kept in enumerate(unit.kept):
            gone = sorted(set(range(unit.dense)) - set(kept))
            label = f"    {head}: "
            indents: Any = {"initial_indent": label, "subsequent_indent": " " * len(label)}
            lines += textwrap.wrap(f"{ranges(kept)} ({ranges(gone)})", _WIDTH, **indents)
    return lines


def _filled(line: str, indent: str) -> list[str]:
    """Wrap a line of prose at 80 columns, without breaking names."""
    return textwrap.wrap(
        line, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _means(layer: LayerReport, kind: Any) -> list[str]:
    """Mean similarity and rank over heads."""
    unit = layer.units.get(kind)
    if unit is None or not unit.heads:
        return ["", ""]
    count = len(unit.heads)
    return [
        _similarity(sum(head.similarity for head in unit.heads) / count),
        f"{sum(head.rank99 for head in unit.heads) / count:.0f}",
    ]


def _findings(head: HeadFindings) -> list[str]:
    return [_similarity(head.similarity), str(head.rank90), str(head.rank99)]


def _similarity(value: float) -> str:
    """Format as ``.31``."""
    return f"{value:.2f}".removeprefix("0")


def _width(layer: LayerReport, kind: Any) -> str:
    if kind in layer.not_prunable:
        return "whole"
    if kind in layer.coupled_with:
        return f"as {layer.coupled_with[kind]}"
    if kind not in layer.units:
        return ""
    unit = layer.units[kind]
    return str(unit.now) if unit.now == unit.dense else f"{unit.now}/{unit.dense}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _comparison(comparison: Comparison, names: Sequence[str]) -> str:
    by_name = {layer.name: layer for layer in comparison.layers}
    rows = [["dense -> slim", "widths", "FLOPs", "ratio", "own error", "error", "agree"]]
    for name in names:
        layer = by_name[name]
        before, after = layer.flops
        rows.append(
            [
                safe(name),
                " ".join(f"{kind} {dense}>{slim}" for kind, (dense, slim) in layer.widths.items()),
                format_flops(after),
                _percent(after / before) if before else "",
                f"{layer.own_error:.3f}",
                f"{layer.error:.3f}",
                f"{layer.agreement:.4f}",
            ]
        )
    (dense, slim), (weights, left) = comparison.flops, comparison.parameters
    lines = [
        f"compared with {safe(comparison.dense)}: {format_flops(slim)} of {format_flops(dense)} FLOPs "
        f"({_percent(slim / dense)}), {format_flops(left)} of {format_flops(weights)} parameters "
        f"({_percent(left / weights)})",
        f"outputs on {safe(comparison.data)}: {_agreement(comparison)}",
        "error: relative error of the layer's output in the pruned model; own error: with the dense model's "
        "input; agree: mean cosine similarity of tokens",
    ]
    return table(rows) + "\n\n" + "\n".join(part for line in lines for part in _filled(line, "  "))


def _agreement(comparison: Comparison) -> str:
    if comparison.agreement is None:
        return f"features differ by {comparison.divergence:.2g} of their variance"
    same = f"{_percent(comparison.agreement)} have the same top-1 class"
    return f"{same}, KL divergence {comparison.divergence:.2g} nats"


def _about(inspection: Inspection, heads: bool) -> list[str]:
    from mhacut.report.history import step

    channels, height, width = inspection.input_size
    classes = f"{inspection.classes} classes" if inspection.classes else "no classifier"
    lines = [
        f"{safe(inspection.architecture)}, {channels}x{height}x{width}, {classes}: "
        f"{format_flops(inspection.flops)} FLOPs, {format_flops(inspection.parameters)} parameters, "
        f"{' and '.join(inspection.dtypes)}",
    ]
    if any(unit.now != unit.dense for layer in inspection.layers for unit in layer.units.values()):
        lines.append("qk, v, hidden: channels per head (of the MLP), pruned/dense")
    if inspection.judged_by is not None:
        lines += [
            "sim: mean similarity between channels of a head, from 0 (different) to 1 (equal)",
            ("r90, r99" if heads else "r99")
            + f": principal channels with {'90, ' if heads else ''}99 % of the energy",
            f"computed from: {safe(inspection.judged_by)}",
        ]
    described = inspection.provenance.describe(inspection.preprocessing)
    lines.append(f"preprocessing: {safe(described)}")
    lines += [f"not prunable: {safe(line)}" for line in inspection.not_prunable]
    lines += [f"step {number}: {step(entry)}" for number, entry in enumerate(inspection.history, start=1)]
    return lines


def _document(result: InspectResult) -> dict[str, Any]:
    """Return the report as a JSON object."""
    inspection = result.inspection
    return {
        "checkpoint": inspection.source,
        "verdict": result.verdict,
        "architecture": inspection.architecture,
        "input_size": inspection.input_size,
        "classes": inspection.classes,
        "flops": inspection.flops,
        "parameters": inspection.parameters,
        "dtypes": inspection.dtypes,
        "tokens": inspection.tokens.to_json(),
        "judged_by": inspection.judged_by,
        "layers": [_layer_document(layer) for layer in result.chosen],
        "comparison": None if result.comparison is None else _comparison_document(result.comparison),
        "left_whole": inspection.not_prunable,
        "preprocessing": inspection.preprocessing.to_json(),
        "preprocessing_from": dict(inspection.provenance.origins),
        "slim": inspection.slim,
        "written": result.written,
        "history": [dict(entry) for entry in inspection.history],
    }


def _comparison_document(comparison: Comparison) -> dict[str, Any]:
    document = asdict(comparison)
    for layer in document["layers"]:
        del layer["family"]
        layer["layer"] = layer.pop("name")
        layer["widths"] = {kind: _sides(pair) for kind, pair in layer["widths"].items()}
        layer["flops"] = _sides(layer["flops"])
    return document | {name: _sides(document[name]) for name in ("flops", "parameters")}


def _sides(pair: tuple[int, int]) -> dict[str, int]:
    return {"dense": pair[0], "slim": pair[1]}


def _layer_document(layer: LayerReport) -> dict[str, Any]:
    same = ("module", "heads", "flops", "share", "parameters", "parameter_share")
    return {
        "layer": layer.name,
        "widths": {kind: {"now": unit.now, "dense": unit.dense} for kind, unit in layer.units.items()},
        "left_whole": dict(layer.not_prunable),
        "goes_with": dict(layer.coupled_with),
        "units": {kind: _unit_document(unit) for kind, unit in layer.units.items()},
        **{name: getattr(layer, name) for name in same},
    }


def _unit_document(unit: UnitReport) -> dict[str, Any]:
    removed = None
    if unit.kept is not None:
        removed = [sorted(set(range(unit.dense)) - set(kept)) for kept in unit.kept]
    return {
        "now": unit.now,
        "dense": unit.dense,
        "basis": unit.basis,
        "kept": None if unit.kept is None else [list(kept) for kept in unit.kept],
        "removed": removed,
        "heads": [asdict(head) for head in unit.heads],
    }
