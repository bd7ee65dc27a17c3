"""Write OpenVINO IR, a pair of files ``NAME.xml`` and ``NAME.bin``, and run it."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mhacut.errors import MhacutError, OutputError
from mhacut.exporting.runtimes import METADATA, Runner, arrays_by_name, onnx_content
from mhacut.options.export import ExportOptions
from mhacut.runtime.files import AnyPath, check_outputs, show, write_whole

_F32: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
"""Precision of inference. By default OpenVINO computes in bfloat16 on CPUs that have it."""


def require_openvino(option: str) -> None:
    """Raise a :class:`MhacutError` that says what to install for ``option``, unless it is installed."""
    missing = [name for name in ("onnx", "onnxscript", "openvino") if not importlib.util.find_spec(name)]
    if missing:
        raise MhacutError(
            f"{option} needs {', '.join(missing)}, not installed here: pip install 'mhacut[openvino]'"
        )


def weights_file(target: AnyPath) -> Path:
    """Return the second file of the IR whose first is ``target``."""
    return Path(target).with_suffix(".bin")


def check_ir(target: Path, *, overwrite: bool, input_path: Path | None) -> None:
    """Raise an :class:`OutputError` if one of the two files must not or cannot be written."""
    check_outputs((target, weights_file(target)), overwrite=overwrite, input_paths=(input_path,))


def write_ir(
    target: Path,
    model: nn.Module,
    size: tuple[int, int, int],
    about: str,
    options: ExportOptions,
    *,
    input_path: Path | None,
    compare: Callable[[Runner], None],
) -> None:
    """Write ``model`` as OpenVINO IR: both files, or none if ``compare`` raises.

    Each file is replaced whole, the weights first. A process that is killed between the two leaves new
    weights beside an old graph; where that matters, write to a new name.

    Args:
        target: the ``.xml`` file; the ``.bin`` file stands beside it.
        model: float32, images to outputs.
        size: size of the images, [C, H, W].
        about: JSON that describes the model, kept as runtime information ``mhacut``.
        options: options of the command; with ``dtype`` float16 only the storage of the weights is float16.
        input_path: the checkpoint, which is never replaced.
        compare: called with a runner of the files; raises if its outputs differ from the model's.

    Raises:
        MhacutError: OpenVINO cannot convert the model.
        OutputError: the files must not or cannot be written.
    """
    import openvino

    converted = _converted(model, size, options.fixed_batch)
    converted.set_rt_info(about, [METADATA])
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "model.xml")
        # Stated, because OpenVINO stores float16 by default.
        try:
            openvino.save_model(converted, written, compress_to_fp16=options.dtype == "float16")
        except RuntimeError as error:
            full = "iostream error" in str(error)  # all that it says of a full disk
            advice = "; is the disk full? TMPDIR chooses another" if full else ""
            raise OutputError(
                f"{show(target)}: OpenVINO cannot write to {folder}: {error!s:.200}{advice}"
            ) from error
        compare(_runner(openvino.Core().read_model(written), None))
        # The weights first: a reader looks for the .xml file.
        for file, source in ((weights_file(target), weights_file(written)), (target, written)):
            write_whole(file, source.read_bytes(), overwrite=options.overwrite, input_path=input_path)


def openvino_runner(model: nn.Module, size: tuple[int, int, int], *, threads: int) -> Runner:
    """Return a runner of ``model`` in OpenVINO on the CPU in float32, for any batch size."""
    return _runner(_converted(model, size, None), threads)


def openvino_program(content: bytes, inputs: tuple[Tensor, ...], threads: int) -> Callable[[], object]:
    """Return a function that runs an ONNX file of a part of a model once, in OpenVINO on the CPU."""
    compiled = _compiled(_read(content, "a layer"), threads)
    given = arrays_by_name(inputs, [place.any_name for place in compiled.inputs])
    return lambda: compiled(given)


def _converted(model: nn.Module, size: tuple[int, int, int], fixed_batch: int | None) -> Any:
    # From ONNX: OpenVINO's own conversion of torch programs takes ten times as long, and loses names.
    return _read(onnx_content(model, size, fixed_batch), type(model).__name__)


def _read(content: bytes, name: str) -> Any:
    import openvino

    try:
        return openvino.Core().read_model(content)
    except RuntimeError as error:
        raise MhacutError(
            f"OpenVINO cannot convert {name}: {_reason(error)}; ONNX Runtime may run it"
        ) from error


def _reason(error: Exception) -> str:
    """Return the line of OpenVINO's message that names what it cannot convert, else its last line."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -")]
    named = [line for line in lines if "operations:" in line]
    return f"{(named or lines[-1:] or ['no reason given'])[0]:.200}"


def _compiled(converted: Any, threads: int | None) -> Any:
    import openvino

    settings = dict(_F32) if threads is None else {**_F32, "INFERENCE_NUM_THREADS": threads}
    return openvino.compile_model(converted, "CPU", settings)


def _runner(converted: Any, threads: int | None) -> Runner:
    compiled = _compiled(converted, threads)

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(compiled(x.numpy())[0].copy())

    return run
