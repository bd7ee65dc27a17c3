"""Export models to ONNX, ``torch.export`` and OpenVINO IR, and run the exported files."""

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
"""Metadata key of an exported file under which a JSON description of the model is stored."""
INPUT, OUTPUT = "images", "logits"
"""Names of the input tensor and the output tensor in an exported file."""
ENDINGS = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml", "timm": "-timm"}
"""Endings of default output names, by export format."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LARGEST_BATCH = 2**31 - 1
"""Upper bound of the batch size in exported files. Without a bound, torch may fail to export."""
_MOST_PATCHES = 1024
"""Upper bound of the rows and columns of patches in files for several image sizes."""

_OPSET = 18
_STACK_TRACE = "pkg.torch.onnx.stack_trace"
"""Metadata key of source lines in an ONNX node. Removed, because the lines name folders of this machine."""
_F32: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
"""OpenVINO setting for float32. The default is bfloat16 on CPUs that support bfloat16."""

Runner = Callable[[Tensor], Tensor]
"""Function that runs an exported model: float32 images [B, C, H, W] to float32 outputs [B, classes]."""


def require_packages(option: str, runtime: str) -> None:
    needed = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
    missing = [name for name in needed.get(runtime, ()) if not importlib.util.find_spec(name)]
    if missing:
        listed = ", ".join(missing)
        raise MhacutError(f"{option} needs {listed}, not installed here: pip install 'mhacut[{runtime}]'")


class _InDtype(nn.Module):
    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, images: Tensor) -> Tensor:
        # float32 logits, so that a softmax does not round again.
        logits: Tensor = self.model(images.to(self.dtype))
        return logits.float()


def in_dtype(model: nn.Module, dtype: str) -> nn.Module:
    """Return ``model``, or a copy that computes in ``dtype`` and has float32 inputs and outputs."""
    return model if dtype == "float32" else _InDtype(copy.deepcopy(model), DTYPES[dtype]).eval()


@contextmanager
def refusing(what: str, advice: str) -> Iterator[None]:
    """Turn errors of an exporter or runtime in this context into :class:`MhacutError` with ``advice``."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while not isinstance(cause, (MhacutError, MemoryError)) and cause.__cause__ is not None:
            cause = cause.__cause__  # exporters wrap the cause in advice for developers
        if isinstance(cause, (MhacutError, MemoryError)):
            raise cause from None
        reason = ": ".join([type(cause).__name__, *str(cause).strip().split("\n")[:1]])
        raise MhacutError(f"{what}: {reason:.200}; {advice}") from error


def patch_side(model: nn.Module) -> int:
    """Return the stride of the first strided convolution, which is the patch embedding; 1 without one."""
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    return next((conv.stride[0] for conv in convolutions if conv.stride[0] > 1), 1)


def _example(
    size: tuple[int, int, int], fixed_batch: int | None, patch: int | None = None
) -> tuple[Tensor, Any]:
    """Return images and their open dimensions; with ``patch``, height and width are open multiples of it."""
    # 2 images: torch treats sizes 0 and 1 as constants.
    images = torch.zeros(fixed_batch or 2, *size)
    shapes: dict[int, Any] = {}
    if fixed_batch is None:
        shapes[0] = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    if patch is not None:
        for place, name in ((2, "rows"), (3, "columns")):
            shapes[place] = patch * torch.export.Dim(name, min=2, max=_MOST_PATCHES)
    return images, (shapes,) if shapes else None


def _example_of(model: nn.Module, size: tuple[int, int, int], options: ExportOptions) -> tuple[Tensor, Any]:
    return _example(size, options.fixed_batch, patch_side(model) if options.dynamic_size else None)


def pt2_file(
    model: nn.Module, size: tuple[int, int, int], about: str, options: ExportOptions
) -> tuple[bytes, Runner]:
    images, shapes = _example_of(model, size, options)
    option = option_name("format", "pt2")
    with refusing(f"{option}: torch.export fails", f"try {option_name('format', 'onnx')}"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its own pytrees
            program = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)
        for graph in program.graph_module.modules():
            for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # names folders of this machine
        written = io.BytesIO()
        torch.export.save(program, written, extra_files={f"{METADATA}.json": about})
        # Loaded again, so that the comparison runs the file, not the traced program.
        again: Any = torch.export.load(io.BytesIO(written.getvalue())).module()
    return written.getvalue(), lambda x: again(x)


def onnx_file(
    model: nn.Module, size: tuple[int, int, int], about: str, options: ExportOptions
) -> tuple[bytes, Runner]:
    option, advice = option_name("format", "onnx"), f"try {option_name('format', 'pt2')}"
    # An unusual opset is a likely cause.
    if options.opset != _OPSET:
        option, advice = (
            option_name("opset", options.opset),
            f"try {option_name('opset', _OPSET)}, the default",
        )
    with refusing(f"{option}: onnxscript or ONNX Runtime fails", advice):
        images, shapes = _example_of(model, size, options)
        content = _onnx_content(model, images, shapes, about, options.opset)
        return content, onnx_runner(content)


RUNTIMES: Mapping[str, Callable[..., tuple[bytes, Runner]]] = {"onnx": onnx_file, "pt2": pt2_file}
"""Functions that export a model, by format. They return the file, and a function that runs the file."""


def onnx_content(model: nn.Module, size: tuple[int, int, int], fixed_batch: int | None = None) -> bytes:
    with refusing("the model cannot be run as ONNX", "PyTorch may run it"):
        return _onnx_content(model, *_example(size, fixed_batch), "{}", _OPSET)


def part_content(part: nn.Module, inputs: tuple[Tensor, ...]) -> bytes:
    """Return the submodule ``part`` as an ONNX file that takes the fixed shapes of ``inputs``."""
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
    if written != opset:  # onnxscript silently ignores an opset that it cannot convert to
        raise ValueError(f"expected opset {opset}, but the installed onnxscript writes opset {written}")
    content: bytes = proto.SerializeToString()
    return content


def _exported(model: nn.Module, inputs: tuple[Tensor, ...], opset: int, **options: Any) -> Any:
    for name in ("onnx_ir", "onnxscript"):  # they log every simplification of the graph
        logging.getLogger(name).setLevel(logging.WARNING)
    # Attention is exported as products and a softmax: torch fails to export scaled_dot_product_attention with
    # 5 dimensions (Twins, Hiera, SAM) and, with gradients, with biases (BEiT, MaxViT, merged tokens).
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
    # By name, because OpenVINO drops inputs that do not change the result.
    tensors = _by_name(inputs)
    return {name: tensors[name].numpy() for name in names}


def _session(content: bytes, threads: int | None) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    if threads is not None:
        settings.intra_op_num_threads = threads
    with refusing("the model cannot be run as ONNX", "PyTorch may run it"):
        return onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])


def onnx_program(content: bytes, inputs: tuple[Tensor, ...], threads: int) -> Callable[[], object]:
    session = _session(content, threads)
    arrays = _arrays(inputs, [place.name for place in session.get_inputs()])
    return lambda: session.run(None, arrays)


def onnx_runner(content: bytes, threads: int | None = None) -> Runner:
    session = _session(content, threads)
    return lambda x: torch.from_numpy(session.run([OUTPUT], {INPUT: x.numpy()})[0])


def weights_file(target: AnyPath) -> Path:
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
    """Write ``model`` as OpenVINO IR (.xml and .bin), unless ``compare`` raises.

    If the export dtype is float16, only the weights are float16.
    """
    import openvino

    converted = _openvino_model(onnx_content(model, size, options.fixed_batch))
    converted.set_rt_info(about, [METADATA])
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "model.xml")
        # On a full disk, OpenVINO only says "iostream error".
        advice = "is the disk full? TMPDIR chooses another"
        with refusing(f"{show(target)}: OpenVINO cannot write to {folder}", advice):
            # OpenVINO's default is float16.
            openvino.save_model(converted, written, compress_to_fp16=options.dtype == "float16")
        compare(_openvino_runner(openvino.Core().read_model(written), None))
        # The weights first: a process killed in between must not leave a new graph with old weights.
        for file, source in ((weights_file(target), weights_file(written)), (target, written)):
            write_file(file, source.read_bytes(), overwrite=options.overwrite, input_path=input_path)


def openvino_runner(model: nn.Module, size: tuple[int, int, int], *, threads: int) -> Runner:
    # With an open batch size, OpenVINO would compute the shapes of merged tokens at run time.
    converted = _openvino_model(onnx_content(model, size))

    @functools.lru_cache(maxsize=1)
    def for_batch(count: int) -> Runner:
        converted.reshape([count, *size])
        return _openvino_runner(converted, threads)

    return lambda images: for_batch(len(images))(images)


def openvino_program(content: bytes, inputs: tuple[Tensor, ...], threads: int) -> Callable[[], object]:
    """Return a function that runs the ONNX file ``content`` once in OpenVINO on ``inputs``."""
    compiled = _compiled(_openvino_model(content), threads)
    arrays = _arrays(inputs, [place.any_name for place in compiled.inputs])
    return lambda: compiled(arrays)


def _openvino_model(content: bytes) -> Any:
    """Convert an ONNX file to OpenVINO. Converting a torch program takes 10 times as long."""
    import openvino

    try:
        return openvino.Core().read_model(content)
    except RuntimeError as error:
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip(" -")]
        named = [line for line in lines if "operations:" in line]  # names of unsupported operations
        reason = (named or lines[-1:] or ["no reason given"])[0]
        raise MhacutError(f"OpenVINO cannot convert the model: {reason:.200}. Try ONNX Runtime") from error


def _openvino_runner(converted: Any, threads: int | None) -> Runner:
    compiled = _compiled(converted, threads)
    # A copy, because the next run writes into the same memory.
    return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())


def _compiled(converted: Any, threads: int | None) -> Any:
    import openvino

    settings = dict(_F32) if threads is None else {**_F32, "INFERENCE_NUM_THREADS": threads}
    return openvino.compile_model(converted, "CPU", settings)
