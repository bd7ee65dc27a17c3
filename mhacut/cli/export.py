"""``mhacut export``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhacut._version import __version__
from mhacut.cli.console import Console, safe, table
from mhacut.cli.flags import command
from mhacut.options.export import ExportOptions

if TYPE_CHECKING:
    from mhacut.commands.export import ExportResult


@command(ExportOptions)
def export(options: ExportOptions, console: Console) -> None:
    """Write CHECKPOINT for another program: as ONNX or pt2, which need neither mhacut nor timm, or for timm.

    The file is run again and compared with CHECKPOINT; if they differ, it is not kept. Its metadata states
    how images are to be prepared. ONNX needs pip install 'mhacut[onnx]'.

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
