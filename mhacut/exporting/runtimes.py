"""Write files that run without mhacut and timm: ONNX and ``torch.export``."""

from __future__ import annotations

import copy
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mhacut.errors import MhacutError, option_name
from mhacut.options.export import ExportOptions

METADATA = "mhacut"
"""Key of the JSON in an exported file that describes it."""
INPUT, OUTPUT = "images", "logits"
"""Names of the input and the output of an exported file."""
ENDINGS = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml", "timm": "-timm"}
"""Endings of default output names."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LARGEST_BATCH = 2**31 - 1
"""Largest batch of an exported file; torch 2.6 fails to export without a bound."""

_OPSET_TO_TIME = 18
"""ONNX opset of models that are timed or converted, the default of ``mhacut export``."""
_OPSET_OF_ATTENTION = 23
"""First ONNX opset with an operator for attention."""
_STACK_TRACE = "pkg.torch.onnx.stack_trace"
"""Key of torch's in a node: lines of code, with folders of this machine."""

Runner = Callable[[Tensor], Tensor]
"""Runs an exported program: images [B, C, H, W] to outputs [B, classes], float32."""


def require_onnx(option: str) -> None:
    """Raise a :class:`MhacutError` that says what to install for ``option``, unless it is installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(name)]
    if missing:
        raise MhacutError(
            f"{option} needs {', '.join(missing)}, not installed here: pip install 'mhacut[onnx]'"
        )


class _InDtype(nn.Module):
    """Model that computes in another dtype behind a float32 interface."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] to outputs [B, classes], both float32."""
        logits: Tensor = self.model(images.to(self.dtype))
        return logits.float()


def in_dtype(model: nn.Module, dtype: str) -> nn.Module:
    """Return ``model``, or a copy that computes in ``dtype``; images and outputs are float32 either way."""
    return model if dtype == "float32" else _InDtype(copy.deepcopy(model), DTYPES[dtype]).eval()


def _example(size: tuple[int, int, int], fixed_batch: int | None) -> tuple[Tensor, Any]:
    """Return images to trace with, [B, C, H, W], and which of their sizes may change."""
    # Sizes 0 and 1 would be taken for constants.
    images = torch.zeros(fixed_batch or 2, *size)
    if fixed_batch is not None:
        return images, None
    return images, ({0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)},)


def _pt2(
    model: nn.Module, size: tuple[int, int, int], about: str, options: ExportOptions
) -> tuple[bytes, Runner]:
    images, shapes = _example(size, options.fixed_batch)
    option = option_name("format", "pt2")
    refused = _refusing(lambda reason: MhacutError(f"{option}: {reason}"), by="torch.export")
    with refused, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its own pytrees
        program = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)
        for graph in filter(
            lambda part: isinstance(part, torch.fx.GraphModule), program.graph_module.modules()
        ):
            for node in graph.graph.nodes:
                node.meta.pop("stack_trace", None)  # names folders of this machine
        written = io.BytesIO()
        torch.export.save(program, written, extra_files={f"{METADATA}.json": about})
        again: Any = torch.export.load(io.BytesIO(written.getvalue())).module()
    return written.getvalue(), lambda x: again(x)


def _onnx(
    model: nn.Module, size: tuple[int, int, int], about: str, options: ExportOptions
) -> tuple[bytes, Runner]:
    images, shapes = _example(size, options.fixed_batch)
    refusing = partial(_refusing, lambda reason: _refused(options.opset, reason))
    with refusing():
        content = _onnx_content(model, images, shapes, about, options.opset)
        return content, _runner(_session(content, None), refusing)


@contextmanager
def _refusing(
    refused: Callable[[str], MhacutError], *, by: str = "onnxscript or ONNX Runtime"
) -> Iterator[None]:
    """Raise ``refused(reason)`` where translator or runtime, ``by``, fail in whatever way on a model."""
    try:
        yield
    except Exception as error:
        causes = [*_causes(error)]
        for cause in causes:
            if isinstance(cause, (MhacutError, MemoryError, torch.OutOfMemoryError)):
                raise cause from None  # the translator wraps these, too
            if isinstance(cause, OSError) and cause.errno is not None:  # of the system, not of inspect
                raise cause from None
        root = next((cause for cause in reversed(causes) if str(cause).strip()), causes[-1])
        # The first line alone: translators add advice to developers.
        reason = ": ".join([type(root).__name__, *str(root).strip().split("\n")[:1]])
        raise refused(f"{by} fails ({reason.removesuffix(': '):.200})") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def refusing_onnx() -> AbstractContextManager[None]:
    """Return a context that raises a :class:`MhacutError` where the model cannot be run as ONNX."""
    return _refusing(
        lambda reason: MhacutError(f"the model cannot be run as ONNX: {reason}; PyTorch may run it")
    )


def refusing_int8() -> AbstractContextManager[None]:
    """Return a context that raises a :class:`MhacutError` where an ONNX file cannot be quantized."""
    option = option_name("int8", True)
    return _refusing(lambda reason: MhacutError(f"{option}: {reason}; without it, the model stays float32"))


def _refused(opset: int, reason: str) -> MhacutError:
    if opset == _OPSET_TO_TIME:
        return MhacutError(f"{option_name('format', 'onnx')}: {reason}; try {option_name('format', 'pt2')}")
    lower = option_name("opset", _OPSET_TO_TIME)
    return MhacutError(f"{option_name('opset', opset)}: {reason}; try a lower one, or {lower}, the default")


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
        raise _refused(opset, f"the installed onnxscript writes opset {written} instead")
    content: bytes = proto.SerializeToString()
    return content


def _exported(model: nn.Module, inputs: tuple[Tensor, ...], opset: int, **options: Any) -> Any:
    for name in ("onnx_ir", "onnxscript"):  # they log every step that simplifies the graph
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if opset >= _OPSET_OF_ATTENTION:
            # torch translates into it neither five dimensions nor keys that several heads share.
            with suppress(Exception):
                return _translated(model, inputs, opset, options)
        with _explicit_attention(model):
            return _translated(model, inputs, opset, options)


def _translated(model: nn.Module, inputs: tuple[Tensor, ...], opset: int, options: dict[str, Any]) -> Any:
    return torch.onnx.export(model, inputs, dynamo=True, verbose=False, opset_version=opset, **options)


@contextmanager
def _explicit_attention(model: nn.Module) -> Iterator[None]:
    """Let attention in ``model`` compute products and a softmax, which is what old opsets get in any case.

    torch's own translation of ``scaled_dot_product_attention`` fails on tensors of five dimensions (Twins,
    Hiera, SAM) and, while gradients are recorded, on biases (BEiT, MaxViT, merged tokens).
    """
    fused: list[Any] = [module for module in model.modules() if getattr(module, "fused_attn", False) is True]
    try:
        for module in fused:
            module.fused_attn = False
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def part_content(part: nn.Module, inputs: tuple[Tensor, ...]) -> bytes:
    """Return a part of a model as an ONNX file, which takes inputs of the shapes of ``inputs`` only."""
    with refusing_onnx():
        program = _exported(part, inputs, _OPSET_TO_TIME, input_names=list(_by_name(inputs)))
        content: bytes = program.model_proto.SerializeToString()
        return content


def _by_name(inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"input_{number}": tensor for number, tensor in enumerate(inputs)}


def arrays_by_name(inputs: tuple[Tensor, ...], names: Collection[str]) -> dict[str, Any]:
    """Return the NumPy arrays that a program of :func:`part_content` takes, by name.

    Args:
        inputs: those that the part was exported with.
        names: inputs of the program; fewer if the runtime leaves out those that do not change the result, as
            OpenVINO does.

    Raises:
        MhacutError: the program takes another input.
    """
    given = _by_name(inputs)
    unexpected = [name for name in names if name not in given]
    if unexpected:
        raise MhacutError(
            f"the program of a layer takes an unexpected input, {unexpected[0]!r}; expected only "
            f"{', '.join(given)}; measure in another runtime ({option_name('runtime')})"
        )
    return {name: given[name].numpy() for name in names}


def _session(content: bytes, threads: int | None) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    if threads is not None:
        settings.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])


def onnx_program(content: bytes, inputs: tuple[Tensor, ...], threads: int) -> Callable[[], object]:
    """Return a function that runs an ONNX file of :func:`part_content` once."""
    with refusing_onnx():
        session = _session(content, threads)
    given = arrays_by_name(inputs, [place.name for place in session.get_inputs()])

    def run() -> object:
        with refusing_onnx():
            return session.run(None, given)

    return run


def onnx_file_runner(content: bytes, threads: int | None = None) -> Runner:
    """Return a runner of an ONNX file in ONNX Runtime on the CPU."""
    with refusing_onnx():
        return _runner(_session(content, threads))


def _runner(session: Any, refusing: Callable[[], AbstractContextManager[None]] = refusing_onnx) -> Runner:
    def run(x: Tensor) -> Tensor:
        with refusing():
            return torch.from_numpy(session.run([OUTPUT], {INPUT: x.numpy()})[0])

    return run


def onnx_content(model: nn.Module, size: tuple[int, int, int], fixed_batch: int | None = None) -> bytes:
    """Return ``model`` as an ONNX file that describes nothing, for any batch size unless one is fixed."""
    with refusing_onnx():
        return _onnx_content(model, *_example(size, fixed_batch), "{}", _OPSET_TO_TIME)


def onnx_runner(model: nn.Module, size: tuple[int, int, int], dtype: str, *, threads: int) -> Runner:
    """Return a runner of ``model`` in ONNX Runtime on the CPU, for any batch size."""
    return onnx_file_runner(onnx_content(in_dtype(model, dtype), size), threads)


RUNTIMES: Mapping[str, Callable[..., tuple[bytes, Runner]]] = {"onnx": _onnx, "pt2": _pt2}
"""Functions that return the content of a file and a runner of it, by format."""
