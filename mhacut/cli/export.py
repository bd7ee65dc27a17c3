"""``mhacut export``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhacut.cli.flags import command
from mhacut.cli.running import Console
from mhacut.options.export import ExportOptions
from mhacut.text import safe, table

if TYPE_CHECKING:
    from mhacut.commands.export import ExportResult
    from mhacut.exporting.quantize import Quantization


_USUAL = (
    "format",
    "output",
    "overwrite",
    "int8",
    "dtype",
    "fixed_batch",
    "dynamic_size",
    "data_dir",
    "push_to_hub",
    "model",
)


@command(ExportOptions, usual=_USUAL)
def export(options: ExportOptions, console: Console) -> None:
    """Export CHECKPOINT to ONNX, OpenVINO, pt2 or timm.

    ONNX, pt2 and OpenVINO files run without mhacut and timm, and describe the preprocessing. Outputs of an
    exported file are compared with outputs of CHECKPOINT. A file with different outputs is deleted. ONNX
    requires pip install 'mhacut[onnx]', OpenVINO requires 'mhacut[openvino]'.

    Examples:
      mhacut export vit-50pct.safetensors --format onnx
      mhacut export vit-50pct.safetensors --format onnx --int8 --data-dir images/
    """
    from mhacut.commands.export import run_export

    result = run_export(options, console)
    console.result(_text(result), result)


BFLOAT16 = (
    "compared in float32. On CPUs with bfloat16, OpenVINO computes in bfloat16, "
    "unless compile_model gets {'INFERENCE_PRECISION_HINT': 'f32'}"
)
"""Note for users about the precision of OpenVINO files on some processors."""


def _text(result: ExportResult) -> str:
    sizes = " ".join("x".join(map(str, size)) for size in result.compared_sizes)
    if len(result.compared_sizes) > 1:
        sizes = f"any image size, compared at {sizes}"
    batch = "any batch" if result.fixed_batch is None else f"batch {result.fixed_batch}"
    rows = [["batch", "difference"]]
    rows += [[str(count), f"{difference:.1e}"] for count, difference in result.difference.items()]
    dtype, what = result.dtype, "between the outputs of both models"
    if result.int8 is not None:
        dtype, what = "INT8", "between INT8 and float32 outputs"
    lines = [
        table(rows),
        "",
        f"{safe(result.architecture)}, {batch} of {sizes}, {dtype}",
        f"difference: largest difference {what}, relative to the largest output",
        *([] if result.int8 is None else _int8_lines(result.int8, result.file_bytes)),
        *([BFLOAT16] if result.format == "openvino" else []),
        f"saved {safe(result.output)}, {result.file_bytes / 1e6:.1f} MB",
        *([] if result.pushed is None else [f"pushed {safe(result.pushed)}"]),
    ]
    return "\n".join(lines)


def _int8_lines(int8: Quantization, file_bytes: int) -> list[str]:
    agreement = int8.agreement
    agreed = f"cosine {agreement.cosine:.4f}"
    if agreement.kl is not None and agreement.same_answer is not None:
        same = f"same top-1 class {100 * agreement.same_answer:.1f}%"
        agreed = f"KL divergence {agreement.kl:.2g} nats, {same}, {agreed}"
    return [
        "",
        f"INT8 compared with float32, on {safe(int8.compared_on)}: {agreed}",
        *(
            [f"in float32 because of outliers: {safe(', '.join(layers))}"]
            if (layers := int8.float32_layers)
            else []
        ),
        f"{int8.speedup:.2f}x faster: {int8.int8_ms:.2f} ms of CPU time per image, float32 "
        f"{int8.float32_ms:.2f} ms (ONNX Runtime, {int8.threads} thread(s))",
        f"{int8.float32_bytes / file_bytes:.2f}x smaller: float32 {int8.float32_bytes / 1e6:.1f} MB",
    ]
