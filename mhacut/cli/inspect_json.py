"""Document that ``mhacut inspect --json`` prints: everything in the report."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mhacut._version import __version__

if TYPE_CHECKING:
    from mhacut.commands.inspect import InspectResult
    from mhacut.inspection.compare import Comparison
    from mhacut.inspection.layers import LayerReport, UnitReport


def document(result: InspectResult) -> dict[str, Any]:
    """Return the report as one JSON object; a slim file's history is passed on unchanged."""
    inspection = result.inspection
    return {
        "command": "inspect",
        "mhacut": __version__,
        "checkpoint": inspection.source,
        "verdict": result.verdict,
        "architecture": inspection.architecture,
        "input_size": list(inspection.input_size),
        "classes": inspection.classes,
        "flops": inspection.flops,
        "parameters": inspection.parameters,
        "dtypes": list(inspection.dtypes),
        "tokens": inspection.tokens.to_json(),
        "judged_by": inspection.judged_by,
        "layers": [_layer(layer) for layer in result.chosen],
        "comparison": None if result.comparison is None else _comparison(result.comparison),
        "left_whole": list(inspection.not_prunable),
        "preprocessing": inspection.preprocessing.to_json(),
        "preprocessing_from": dict(inspection.provenance.origins),
        "slim": inspection.slim,
        "written": [str(path) for path in result.written],
        "history": [dict(entry) for entry in inspection.history],
    }


def _comparison(found: Comparison) -> dict[str, Any]:
    def sides(pair: tuple[int, int]) -> dict[str, int]:
        return {"dense": pair[0], "slim": pair[1]}

    return {
        "dense": found.dense,
        "flops": sides(found.flops),
        "parameters": sides(found.parameters),
        "agreement": found.agreement,
        "divergence": found.divergence,
        "images": found.images,
        "data": found.data,
        "layers": [
            {
                "layer": layer.name,
                "widths": {kind: sides(pair) for kind, pair in layer.widths.items()},
                "flops": sides(layer.flops),
                "own_error": layer.own_error,
                "error": layer.error,
                "agreement": layer.agreement,
            }
            for layer in found.layers
        ],
    }


def _layer(layer: LayerReport) -> dict[str, Any]:
    return {
        "layer": layer.name,
        "module": layer.module,
        "heads": layer.heads,
        "widths": {kind: {"now": unit.now, "dense": unit.dense} for kind, unit in layer.units.items()},
        "left_whole": dict(layer.not_prunable),
        "goes_with": dict(layer.coupled_with),
        "flops": layer.flops,
        "share": layer.share,
        "parameters": layer.parameters,
        "parameter_share": layer.parameter_share,
        "units": {kind: _unit(unit) for kind, unit in layer.units.items()},
    }


def _unit(unit: UnitReport) -> dict[str, Any]:
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
