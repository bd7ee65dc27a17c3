"""Files that run without mhacut and timm, and programs of them: ONNX, ``torch.export`` and OpenVINO IR."""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mhacut.errors import MhacutError, option_name
from mhacut.options.export import ExportOptions
from mhacut.runtime.files import AnyPath, show, write_file

METADATA = "mhacut"
"""Key of the JSON in an exported file that describes it."""
INPUT, OUTPUT = "images", "logits"
"""Names of the input and the output of an exported file."""
ENDINGS = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml", "timm": "-timm"}
"""Endings of default output names."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LARGEST_BATCH = 2**31 - 1
"""Largest batch of an exported file; torch may fail to export without a bound."""

_OPSET = 18
"""ONNX opset of models that are timed or converted, the default of ``mhacut export``."""
_STACK_TRACE = "pkg.torch.onnx.stack_trace"
"""Key of torch's in a node: lines of code, with folders of this machine."""
_F32: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
"""Precision of inference. By default OpenVINO computes in bfloat16 on CPUs that have it."""

Runner = Callable[[Tensor], Tensor]
"""Runs an exported program: images [B, C, H, W] to outputs [B, classes], float32."""


def require_packages(option: str, runtime: str) -> None:
    """Raise a :class:`MhacutError` that says what to install for ``option``, unless it is installed."""
    needed = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
    missing = [name for name in needed.get(runtime, ()) if not importlib.util.find_spec(name)]
    if missing:
        listed = ", ".join(missing)
        raise MhacutError(f"{option} needs {listed}, not installed here: pip install 'mhacut[{runtime}]'")


class _InDtype(nn.Module):
    """Model that computes in another dtype behind a float32 interface."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] to outputs [B, classes], both float32."""
        # float32 outside: callers need not know the type, and no softmax of logits rounds once more.
        logits: Tensor = self.model(images.to(self.dtype))
        return logits.float()


def in_dtype(model: nn.Module, dtype: str) -> nn.Module:
    """Return ``model``, or a copy that computes in ``dtype``; images and outputs are float32 either way."""
    return model if dtype == "float32" else _InDtype(copy.deepcopy(model), DTYPES[dtype]).eval()


@contextmanager
def refusing(what: str, advice: str) -> Iterator[None]:
    """Raise a :class:`MhacutError` where translators and runtimes fail, in whatever way, on a model."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while not isinstance(cause, (MhacutError, MemoryError)) and cause.__cause__ is not None:
            cause = cause.__cause__  # translators wrap the reason in advice to developers
        if isinstance(cause, (MhacutError, MemoryError)):
            raise cause from None
        reason = ": ".join([type(cause).__name__, *str(cause).strip().split("\n")[:1]])
        raise MhacutError(f"{what}: {reason:.200}; {advice}") from error


def _example(size: tuple[int, int, int], fixed_batch: int | None) -> tuple[Tensor, Any]:
    """Return images to trace with, [B, C, H, W], and which of their sizes may change."""
    # Sizes 0 and 1 would be taken for constants.
    images = torch.zeros(fixed_batch or 2, *size)
    if fixed_batch is not None:
        return images, None
    return images, ({0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)},)


def pt2_file(
    model: nn.Module, size: tuple[int, int, int], about: str, options: ExportOptions
) -> tuple[bytes, Runner]:
    """Return ``model`` as a file of ``torch.export``, and a runner of it; arguments as :func:`onnx_file`."""
    images, shapes = _example(size, options.fixed_batch)
    asked = option_name("format", "pt2")
    with refusing(f"{asked}: torch.export fails", f"try {option_name('format', 'onnx')}"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its own pytrees
            program = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)
        for graph in program.graph_module.modules():
            for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # names folders of this machine
        written = io.BytesIO()
        torch.export.save(program, written, extra_files={f"{METADATA}.json": about})
        # Run from what was written, not from what was traced: the two are to be compared.
        again: Any = torch.export.load(io.BytesIO(written.getvalue())).module()
    return written.getvalue(), lambda x: again(x)


def onnx_file(
    model: nn.Module, size: tuple[int, int, int], about: str, options: ExportOptions
) -> tuple[bytes, Runner]:
    """Return ``model`` as an ONNX file, and a runner of it.

    Args:
        model: model to export, images to outputs.
        size: size of the images, [C, H, W].
        about: JSON that describes the model.
        options: options of the command.
    """
    asked, advice = option_name("format", "onnx"), f"try {option_name('format', 'pt2')}"
    # An opset that was asked for is the likelier cause.
    if options.opset != _OPSET:
        asked, advice = (
            option_name("opset", options.opset),
            f"try {option_name('opset', _OPSET)}, the default",
        )
    with refusing(f"{asked}: onnxscript or ONNX Runtime fails", advice):
        images, shapes = _example(size, options.fixed_batch)
        content = _onnx_content(model, images, shapes, about, options.opset)
        return content, onnx_runner(content)


RUNTIMES: Mapping[str, Callable[..., tuple[bytes, Runner]]] = {"onnx": onnx_file, "pt2": pt2_file}
"""Functions that return the content of a file and a runner of it, by format."""


def onnx_content(model: nn.Module, size: tuple[int, int, int], fixed_batch: int | None = None) -> bytes:
    """Return ``model`` as an ONNX file that describes nothing, for any batch size unless one is fixed."""
    with refusing("the model cannot be run as ONNX", "PyTorch may run it"):
        return _onnx_content(model, *_example(size, fixed_batch), "{}", _OPSET)


def part_content(part: nn.Module, inputs: tuple[Tensor, ...]) -> bytes:
    """Return a part of a model as an ONNX file, which takes inputs of the shapes of ``inputs`` only."""
    with refusing("a layer cannot be run as ONNX", "PyTorch may run it"):
        program = _exported(part, inputs, _OPSET, input_names=list(_by_name(inputs)))
        content: bytes = program.model_proto.SerializeToString()
        return content


def _onnx_content(model: nn.Module, images: Tensor, shapes: Any, about: str, opset: int) -> bytes:
    names = {"input_names": [INPUT], "output_names": [OUTPUT]}
    program = _exported(model, (images,), opset, dynamic_shapes=shapes, **names)
    program.model.metadata_props[METADATA] = about
    for graph in (program.model.graph, *program.model.functions.values()):
        for node in graph.all_nodes():
            node.metadata_props.pop(_STACK_TRACE, None)
    proto = program.model_proto
    written = max(entry.version for entry in proto.opset_import if entry.domain == "")
    if written != opset:  # an opset beyond those that it can convert to leaves the model as it was
        raise ValueError(f"the installed onnxscript writes opset {written} instead")
    content: bytes = proto.SerializeToString()
    return content


def _exported(model: nn.Module, inputs: tuple[Tensor, ...], opset: int, **options: Any) -> Any:
    """Translate ``model`` by torch, its attention as products and a softmax.

    torch's own translation of ``scaled_dot_product_attention`` fails on tensors of five dimensions (Twins,
    Hiera, SAM) and, while gradients are recorded, on biases (BEiT, MaxViT, merged tokens).
    """
    for name in ("onnx_ir", "onnxscript"):  # they log every step that simplifies the graph
        logging.getLogger(name).setLevel(logging.WARNING)
    fused: list[Any] = [module for module in model.modules() if getattr(module, "fused_attn", False) is True]
    try:
        for module in fused:
            module.fused_attn = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return torch.onnx.export(
                model, inputs, dynamo=True, verbose=False, opset_version=opset, **options
            )
    finally:
        for module in fused:
            module.fused_attn = True


def _by_name(inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"input_{number}": tensor for number, tensor in enumerate(inputs)}


def _arrays(inputs: tuple[Tensor, ...], names: Collection[str]) -> dict[str, Any]:
    """Return the NumPy arrays that a program of :func:`part_content` takes.

    By name, since runtimes leave out inputs that do not change the result, as OpenVINO does.
    """
    given = _by_name(inputs)
    return {name: given[name].numpy() for name in names}


def _session(content: bytes, threads: int | None) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    if threads is not None:
        settings.intra_op_num_threads = threads
    with refusing("the model cannot be run as ONNX", "PyTorch may run it"):
        return onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])


def onnx_program(content: bytes, inputs: tuple[Tensor, ...], threads: int) -> Callable[[], object]:
    """Return a function that runs an ONNX file of :func:`part_content` once."""
    session = _session(content, threads)
    given = _arrays(inputs, [place.name for place in session.get_inputs()])
    return lambda: session.run(None, given)


def onnx_runner(content: bytes, threads: int | None = None) -> Runner:
    """Return a runner of an ONNX file in ONNX Runtime on the CPU."""
    session = _session(content, threads)
    return lambda x: torch.from_numpy(session.run([OUTPUT], {INPUT: x.numpy()})[0])


def weights_file(target: AnyPath) -> Path:
    """Return the second file of the OpenVINO IR whose first is ``target``."""
    return Path(target).with_suffix(".bin")


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
    """
    import openvino

    converted = _openvino_model(onnx_content(model, size, options.fixed_batch))
    converted.set_rt_info(about, [METADATA])
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "model.xml")
        # All that OpenVINO says of a full disk is "iostream error".
        advice = "is the disk full? TMPDIR chooses another"
        with refusing(f"{show(target)}: OpenVINO cannot write to {folder}", advice):
            # Stated, because OpenVINO stores float16 by default.
            openvino.save_model(converted, written, compress_to_fp16=options.dtype == "float16")
        compare(_openvino_runner(openvino.Core().read_model(written), None))
        # The weights first: a reader looks for the .xml file.
        for file, source in ((weights_file(target), weights_file(written)), (target, written)):
            write_file(file, source.read_bytes(), overwrite=options.overwrite, input_path=input_path)


def openvino_runner(model: nn.Module, size: tuple[int, int, int], *, threads: int) -> Runner:
    """Return a runner of ``model`` in OpenVINO on the CPU in float32, compiled for the batch it is given.

    With an open batch size, OpenVINO computes the shapes of merged tokens as it runs.
    """
    converted = _openvino_model(onnx_content(model, size))

    @functools.lru_cache(maxsize=1)
    def for_batch(count: int) -> Runner:
        converted.reshape([count, *size])
        return _openvino_runner(converted, threads)

    return lambda images: for_batch(len(images))(images)


def openvino_program(content: bytes, inputs: tuple[Tensor, ...], threads: int) -> Callable[[], object]:
    """Return a function that runs an ONNX file of :func:`part_content` once, in OpenVINO on the CPU."""
    compiled = _compiled(_openvino_model(content), threads)
    given = _arrays(inputs, [place.any_name for place in compiled.inputs])
    return lambda: compiled(given)


def _openvino_model(content: bytes) -> Any:
    """Convert from ONNX: OpenVINO's own conversion of torch programs takes ten times as long."""
    import openvino

    try:
        return openvino.Core().read_model(content)
    except RuntimeError as error:
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -")]
        named = [line for line in lines if "operations:" in line]  # what it cannot convert
        reason = (named or lines[-1:] or ["no reason given"])[0]
        raise MhacutError(
            f"OpenVINO cannot convert the model: {reason:.200}; ONNX Runtime may run it"
        ) from error


def _openvino_runner(converted: Any, threads: int | None) -> Runner:
    compiled = _compiled(converted, threads)
    # Copied, because the next run writes into the same memory.
    return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())


def _compiled(converted: Any, threads: int | None) -> Any:
    import openvino

    settings = dict(_F32) if threads is None else {**_F32, "INFERENCE_NUM_THREADS": threads}
    return openvino.compile_model(converted, "CPU", settings)
