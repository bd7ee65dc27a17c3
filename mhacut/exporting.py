"""``mhacut export`` as a function: a checkpoint in, a file that runs without mhacut and timm out."""

from __future__ import annotations

import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mhacut.checkpoint.load import LoadedModel, read_as_told
from mhacut.checkpoint.write import check_output, write_whole
from mhacut.errors import MhacutError
from mhacut.inspection import resolve_preprocessing
from mhacut.options import ExportOptions, PathLike, PreprocessingOptions
from mhacut.progress import Reporter, Silent

METADATA = "mhacut"
"""Where an exported file holds what :func:`_about` says, as JSON."""
INPUT, OUTPUT = "images", "logits"
_ENDING = {"onnx": ".onnx", "pt2": ".pt2"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_TRIED = (1, 2, 5)
"""Batch sizes at which a file for any number of images is tried."""
TOLERANCE: Mapping[str, float] = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest difference from the model in float32 that rounding explains, in units of the largest output."""

Runner = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ExportResult:
    """What :func:`export` did."""

    output: Path
    format: str
    architecture: str
    dtype: str
    input_size: tuple[int, int, int]
    """[C, H, W], normalised as ``preprocessing`` says."""
    fixed_batch: int | None
    preprocessing: Mapping[str, Any]
    """Also in the file's metadata."""
    file_bytes: int
    difference: Mapping[int, float]
    """Per batch size tried: the largest difference of the written file's output, run again, from the
    model's, in units of the largest output."""


def export(checkpoint: PathLike, *, reporter: Reporter | None = None, **options: Any) -> ExportResult:
    """Write a checkpoint, dense or slim, for another runtime, and compare what that runtime computes.

    Args:
        checkpoint: whatever ``mhacut prune`` reads or writes.
        reporter: told what happens; silent by default.
        options: the names of the command line's flags, see :class:`mhacut.options.ExportOptions`:
            ``format``, ``output``, ``dtype``, ``fixed_batch``, ``opset``, ...

    Raises:
        MhacutError: and its kinds, in :mod:`mhacut.errors`; nothing was written.
    """
    return run_export(ExportOptions.from_flat(checkpoint=checkpoint, **options), reporter or Silent())


def run_export(options: ExportOptions, reporter: Reporter) -> ExportResult:
    """:func:`export` with its options in one object."""
    if options.format == "onnx":
        require_onnx("--format onnx")
    if options.output is not None:
        check_output(options.output, overwrite=options.overwrite, input_path=options.checkpoint)
    reporter.start("reading")
    loaded = read_as_told(options, reporter)
    target = Path(options.output or f"{loaded.stem}{_ENDING[options.format]}")
    check_output(target, overwrite=options.overwrite, input_path=loaded.path)
    model = loaded.model.requires_grad_(False)
    preprocessing = resolve_preprocessing(loaded, PreprocessingOptions())
    about = json.dumps(_about(loaded, preprocessing.to_json()), sort_keys=True)
    size = preprocessing.input_size
    differences: dict[int, float] = {}

    def write(temporary: Path) -> None:
        reporter.start("exporting")
        content, run = _FORMATS[options.format](_in_dtype(model, options.dtype), size, about, options)
        temporary.write_bytes(content)
        reporter.start("comparing")
        differences.update(_compared(model, run, size, options))

    write_whole(target, write, overwrite=options.overwrite, input_path=loaded.path)
    return ExportResult(
        output=target,
        format=options.format,
        architecture=loaded.identity.architecture,
        dtype=options.dtype,
        input_size=size,
        fixed_batch=options.fixed_batch,
        preprocessing=preprocessing.to_json(),
        file_bytes=target.stat().st_size,
        difference=differences,
    )


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


def _in_dtype(model: nn.Module, dtype: str) -> nn.Module:
    import copy

    return model if dtype == "float32" else _InDtype(copy.deepcopy(model), DTYPES[dtype]).eval()


def _about(loaded: LoadedModel, preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says about itself: how to prepare images, and what was done to the model."""
    history = () if loaded.record is None else loaded.record.history
    return {
        "architecture": loaded.identity.architecture,
        "preprocessing": preprocessing,
        "history": [dict(entry) for entry in history],
    }


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
    content = _onnx_content(_in_dtype(model, dtype), images, shapes, "{}", options.opset)
    return _onnx_runner(content, threads)


_FORMATS: Mapping[str, Callable[..., tuple[bytes, Runner]]] = {"onnx": _onnx, "pt2": _pt2}


@torch.no_grad()
def _compared(
    model: nn.Module, run: Runner, size: tuple[int, int, int], options: ExportOptions
) -> dict[int, float]:
    """Per batch size, how far ``run`` is from ``model``.

    Raises:
        MhacutError: farther than rounding explains.
    """
    generator = torch.Generator().manual_seed(0)
    differences = {}
    for count in _TRIED if options.fixed_batch is None else (options.fixed_batch,):
        images = torch.randn(count, *size, generator=generator)
        expected = model(images)
        largest = expected.abs().max().clamp_min(1e-12)
        differences[count] = float((run(images) - expected).abs().max() / largest)
        if not differences[count] <= TOLERANCE[options.dtype]:
            raise MhacutError(
                f"the {options.format} file differs from the model by {differences[count]:.1e} of the "
                f"largest output at batch size {count}; at most {TOLERANCE[options.dtype]:g} was expected in "
                f"{options.dtype}; nothing was written"
                + ("; try --dtype float32" if options.dtype != "float32" else "")
            )
    return differences
