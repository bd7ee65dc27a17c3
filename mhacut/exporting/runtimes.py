"""Files that run without mhacut and timm: ONNX and ``torch.export``."""

from __future__ import annotations

import copy
import importlib.util
import io
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mhacut.errors import MhacutError
from mhacut.options.export import ExportOptions

METADATA = "mhacut"
"""Where an exported file holds, as JSON, what it says about itself."""
INPUT, OUTPUT = "images", "logits"
ENDINGS = {"onnx": ".onnx", "pt2": ".pt2", "timm": "-timm"}
"""Of default names."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Runner = Callable[[Tensor], Tensor]


def require_onnx(flag: str) -> None:
    """Raise a :class:`MhacutError` that says what to install, for ``flag``, unless it is there."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(name)]
    if missing:
        raise MhacutError(
            f"{flag} needs {', '.join(missing)}, not installed here: pip install 'mhacut[onnx]'"
        )


class _InDtype(nn.Module):
    """A model that computes in another dtype behind a float32 interface."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes], both float32."""
        logits: Tensor = self.model(images.to(self.dtype))
        return logits.float()


def in_dtype(model: nn.Module, dtype: str) -> nn.Module:
    """``model``, or a copy that computes in ``dtype``; images and outputs are float32 either way."""
    return model if dtype == "float32" else _InDtype(copy.deepcopy(model), DTYPES[dtype]).eval()


def _traced(model: nn.Module, size: tuple[int, int, int], options: ExportOptions) -> tuple[Tensor, Any]:
    """An example to trace with, and which of its sizes may change."""
    # Sizes 0 and 1 would be taken for constants.
    images = torch.zeros(options.fixed_batch or 2, *size)
    if options.fixed_batch is not None:
        return images, None
    return images, ({0: torch.export.Dim("batch", min=1)},)


def _pt2(
    model: nn.Module, size: tuple[int, int, int], about: str, options: ExportOptions
) -> tuple[bytes, Runner]:
    images, shapes = _traced(model, size, options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its own pytrees
        program = torch.export.export(model, (images,), dynamic_shapes=shapes)
        written = io.BytesIO()
        torch.export.save(program, written, extra_files={f"{METADATA}.json": about})
        again: Any = torch.export.load(io.BytesIO(written.getvalue())).module()
    return written.getvalue(), lambda x: again(x)


def _onnx(
    model: nn.Module, size: tuple[int, int, int], about: str, options: ExportOptions
) -> tuple[bytes, Runner]:
    images, shapes = _traced(model, size, options)
    content = _onnx_content(model, images, shapes, about, options.opset)
    return content, _onnx_runner(content)


def _onnx_content(model: nn.Module, images: Tensor, shapes: Any, about: str, opset: int) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program: Any = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            dynamic_shapes=shapes,
            input_names=[INPUT],
            output_names=[OUTPUT],
        )
    program.model.metadata_props[METADATA] = about
    content: bytes = program.model_proto.SerializeToString()
    return content


def _onnx_runner(content: bytes, threads: int | None = None) -> Runner:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    if threads is not None:
        settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: x.numpy()})[0])

    return run


def onnx_runner(model: nn.Module, size: tuple[int, int, int], dtype: str, *, threads: int) -> Runner:
    """``model`` in ONNX Runtime on the CPU, for any number of images [B, C, H, W], float32."""
    options = ExportOptions(checkpoint="", dtype=dtype)  # type: ignore[arg-type]
    images, shapes = _traced(model, size, options)
    content = _onnx_content(in_dtype(model, dtype), images, shapes, "{}", options.opset)
    return _onnx_runner(content, threads)


RUNTIMES: Mapping[str, Callable[..., tuple[bytes, Runner]]] = {"onnx": _onnx, "pt2": _pt2}
"""Per format: the content of a file, and a runner of it."""
