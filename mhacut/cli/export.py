"""``mhacut export``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhacut._version import __version__
from mhacut.cli.console import Console, safe, table
from mhacut.cli.flags import FLAGS, Flag, command
from mhacut.options.export import ExportOptions

if TYPE_CHECKING:
    from mhacut.commands.export import ExportResult

_FLAGS: dict[str, Flag] = {
    "checkpoint": Flag("", "Slim or dense: .safetensors, .pth, a timm folder, or timm:NAME.", "CHECKPOINT"),
    "format": Flag(
        "Result", "For ONNX Runtime and others, for torch.export.load, or a folder for timm and the hub."
    ),
    "output": Flag(
        "Result", "File or folder to write; by default CHECKPOINT's stem and an ending, here.", "PATH", "-o"
    ),
    "overwrite": FLAGS["overwrite"],
    "dtype": Flag("Result", "What the file computes in; images and logits are float32 always."),
    "fixed_batch": Flag("Result", "Images at a time; by default any number.", "N"),
    "opset": Flag("Result", "Of ONNX; from 23 on it has an operator for attention.", "N"),
    "model": FLAGS["model"],
    "model_args": FLAGS["model_args"],
    "num_classes": FLAGS["num_classes"],
}


@command(ExportOptions, flags=_FLAGS)
def export(options: ExportOptions, console: Console) -> None:
    """Write CHECKPOINT for another program: as ONNX or pt2, which need neither mhacut nor timm, or for timm.

    What was written is run again and compared with CHECKPOINT; what differs is not kept. It says itself how
    images are to be prepared. ONNX needs pip install 'mhacut[onnx]'.

    Example: mhacut export vit-2.0G.safetensors --format onnx
    """
    from mhacut.commands.export import run_export

    result = run_export(options, console)
    console.result(_text(result), _document(result))


def _text(result: ExportResult) -> str:
    channels, height, width = result.input_size
    batch = "any batch" if result.fixed_batch is None else f"batch {result.fixed_batch}"
    rows = [["batch", "difference"]]
    rows += [[str(count), f"{difference:.1e}"] for count, difference in result.difference.items()]
    lines = [
        table(rows),
        "",
        f"{safe(result.architecture)}, {batch} of {channels}x{height}x{width}, {result.dtype}",
        "difference: from the model, in units of its largest output",
        f"saved {safe(result.output)}, {result.file_bytes / 1e6:.1f} MB",
    ]
    return "\n".join(lines)


def _document(result: ExportResult) -> dict[str, Any]:
    return {
        "command": "export",
        "mhacut": __version__,
        "output": str(result.output),
        "format": result.format,
        "architecture": result.architecture,
        "dtype": result.dtype,
        "input_size": list(result.input_size),
        "fixed_batch": result.fixed_batch,
        "preprocessing": dict(result.preprocessing),
        "file_bytes": result.file_bytes,
        "difference": {str(count): difference for count, difference in result.difference.items()},
    }
