"""``mhacut evaluate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhacut.cli.flags import command
from mhacut.cli.running import Console
from mhacut.options.measure import EvaluateOptions
from mhacut.text import safe, table

if TYPE_CHECKING:
    from mhacut.checkpoint.provenance import Provenance
    from mhacut.commands.evaluate import EvaluateResult
    from mhacut.data import Preprocessing


@command(EvaluateOptions)
def evaluate(options: EvaluateOptions, console: Console) -> None:
    """Measure the accuracy of CHECKPOINT, dense or slim, on labelled images.

    Images are preprocessed as the checkpoint states; flags override this.

    Example: mhacut evaluate vit-2.0G.safetensors --data-dir images/
    """
    from mhacut.commands.evaluate import run_evaluate

    measured = run_evaluate(options, console)
    console.result(_text(measured), _document(measured))


def _text(measured: EvaluateResult) -> str:
    evaluation = measured.evaluation
    return "\n".join(
        [
            table(measured.rows()),
            "",
            f"model: {safe(measured.architecture)} from {safe(measured.source)}",
            f"data: {safe(measured.data)}, in {evaluation.seconds:.1f} s on {safe(measured.device)}",
            *preprocessing_lines(measured.preprocessing, measured.provenance),
        ]
    )


def preprocessing_lines(preprocessing: Preprocessing, provenance: Provenance) -> list[str]:
    """Describe preprocessing, where it comes from, and which one would be better."""
    lines = [f"preprocessing: {safe(provenance.describe(preprocessing))}"]
    return lines if provenance.hint is None else [*lines, safe(provenance.hint)]


def _document(measured: EvaluateResult) -> dict[str, Any]:
    evaluation = measured.evaluation
    return {
        "checkpoint": measured.source,
        "architecture": measured.architecture,
        "top1": evaluation.top1,
        "top5": evaluation.top5,
        "images": evaluation.images,
        "seconds": evaluation.seconds,
        "flops": measured.flops,
        "parameters": measured.parameters,
        "preprocessing": measured.preprocessing.to_json(),
        **measured.provenance.to_json(),
        "data": measured.data,
        "device": measured.device,
    }
