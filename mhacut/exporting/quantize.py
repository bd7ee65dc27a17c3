"""Quantize an ONNX file to INT8 by ONNX Runtime's own quantizer, and compare it with float32.

Weights have a scale for each output channel. Ranges of activations are found as the file runs ("dynamic"), or
beforehand on images ("static"), which was as fast in ONNX Runtime and a little further off.
"""

from __future__ import annotations

import ast
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mhacut.data import CalibrationImages, Preprocessing, calibration_images
from mhacut.errors import MhacutError, option_name
from mhacut.exporting.runtimes import INPUT, METADATA, Runner, onnx_runner, refusing
from mhacut.measuring.accuracy import Agreement, agreement
from mhacut.measuring.latency import fixed_images, run_of, take_turns
from mhacut.options.base import DataOptions
from mhacut.options.export import ExportOptions, QuantizationMethod
from mhacut.surgery.find import gives_probabilities

_LINEAR = ["MatMul", "Gemm"]
"""Operators that are quantized. Softmax, LayerNorm and GELU stay float32, as do convolutions, which are one
patch embedding in a ViT and slower in INT8 than in float32 where ranges are dynamic. Products of activations
(queries and keys, attention and values) stay float32 too: only a constant second factor is quantized."""
FAR_KL, FAR_COSINE = 0.1, 0.98
"""KL divergence in nats above which, or cosine below which without classes, an INT8 model is far off."""
TOO_MUCH = 0.01
"""Relative squared error of a layer's outputs above which it stays float32. ViTs have massive activations
(Sun et al., arXiv 2402.17762): one value of a token, hundreds of times the others, sets the step for all.
The errors of layers without such outliers are two orders of magnitude below this, of those with them one
above."""
_LEVELS = 255
_SCOPES = "pkg.torch.onnx.name_scopes"
"""Key under which torch's exporter keeps the names of the modules that a node comes from."""
_HELD_OUT = 0.25
_NOISE_IMAGES = 32
_BATCH = 8
_OUTLIER_BATCHES = 2
_SECONDS = 2.0
_SEED = 42


@dataclass(frozen=True)
class Quantization:
    """Manner in which an INT8 file was made, and its comparison with float32."""

    method: QuantizationMethod
    """Whether ranges of activations are found as the file runs, or were on images."""
    reduce_range: bool
    float32_layers: tuple[str, ...]
    """Linear layers that stay float32, because outliers of their inputs would take up the range of INT8."""
    compared_on: str
    """Description of the images of the comparison; outliers and static ranges were found on others."""
    agreement: Agreement
    """Agreement with the float32 model."""
    float32_bytes: int
    """Size of the float32 file."""
    float32_ms: float
    """Median CPU time for one image in ONNX Runtime, interleaved with the INT8 file; with several threads,
    the time of all."""
    int8_ms: float
    """The same for the INT8 file."""
    speedup: float
    """Median ratio of the float32 file's time to the INT8 file's in the same round."""
    threads: int

    @property
    def far(self) -> bool:
        """Whether outputs differ too much from those of the float32 model to be of use."""
        kl, cosine = self.agreement.kl, self.agreement.cosine
        return not (cosine >= FAR_COSINE if kl is None else kl <= FAR_KL)


class NothingToQuantizeError(MhacutError):
    """An ONNX model without a linear layer that ONNX Runtime can quantize."""


def refusing_int8() -> AbstractContextManager[None]:
    """Return a context that raises a :class:`MhacutError` where an ONNX file cannot be quantized."""
    return refusing(f"{option_name('int8', True)}: ONNX Runtime fails", "without it, the model stays float32")


def quantize(
    content: bytes,
    *,
    calibration: Sequence[Tensor] = (),
    reduce_range: bool = False,
    exclude: Collection[str] = (),
) -> bytes:
    """Return an ONNX file with the weights of its linear layers in INT8.

    Args:
        content: a float32 ONNX file.
        calibration: batches of images to find static ranges of activations on, [B, C, H, W] float32; without
            any, ranges are dynamic.
        reduce_range: round weights to 7 bits, for CPUs without VNNI, where products of 8 bits overflow.
        exclude: names of nodes that stay float32.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = onnx.load_from_string(content)
    linear = {node.name for node in _linear_nodes(model)}.difference(exclude)
    left = [node.name for node in model.graph.node if node.op_type in _LINEAR and node.name not in linear]
    shared: dict[str, Any] = {
        "op_types_to_quantize": _LINEAR,
        # The dynamic quantizer makes a MatMul of a Gemm first.
        "nodes_to_exclude": [*left, *(f"{name}_MatMul" for name in left)],
        # A scale for each output channel costs no time: it is applied after the sum over inputs.
        "per_channel": True,
        "reduce_range": reduce_range,
        "weight_type": QuantType.QInt8,
        # Without the second, a static file rounds what goes into the residual stream too.
        "extra_options": {"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": _LINEAR},
    }
    with tempfile.TemporaryDirectory() as folder, _quiet(), refusing_int8():
        exact, prepared, written = (Path(folder, f"{name}.onnx") for name in ("exact", "prepared", "int8"))
        exact.write_bytes(content)
        # Shapes of the batch are symbols, which its other pass would need names for.
        quant_pre_process(str(exact), str(prepared), skip_symbolic_shape=True)
        _forget_shapes_of_weights(prepared)
        if calibration:
            unsigned = QuantType.QUInt8  # what the kernels of x86 multiply with signed weights
            # Its default is the range of all values seen, so that nothing of these images is clipped.
            images = _CalibrationReader(calibration)
            quantize_static(str(prepared), str(written), images, activation_type=unsigned, **shared)
        else:
            quantize_dynamic(str(prepared), str(written), **shared)
        made = onnx.load(str(written))
    matrices = (one for one in made.graph.initializer if len(one.dims) > 1)
    if not any(one.data_type == onnx.TensorProto.INT8 for one in matrices):
        raise NothingToQuantizeError(
            f"{option_name('int8', True)}: the model has no linear layer that ONNX Runtime can quantize; "
            "nothing was written. Export it in float32"
        )
    for item in made.metadata_props:
        if item.key == METADATA:
            int8 = {"activations": "static" if calibration else "dynamic", "reduce_range": reduce_range}
            item.value = json.dumps({**json.loads(item.value), "int8": int8}, sort_keys=True)
    quantized: bytes = made.SerializeToString()
    return quantized


class _CalibrationReader:
    """Batches of images, as ONNX Runtime's calibration asks for them."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self._left = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch by the name of the input; None after the last."""
        batch = next(self._left, None)
        return None if batch is None else {INPUT: batch.numpy()}


def _forget_shapes_of_weights(path: Path) -> None:
    """Remove the shapes that the file states of its weights a second time.

    onnxruntime 1.23, the last for Python 3.10, transposes weights but not those, which onnx 1.23 refuses.
    """
    import onnx

    model = onnx.load(str(path))
    weights = {tensor.name for tensor in model.graph.initializer}
    others = [info for info in model.graph.value_info if info.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(others)
    onnx.save(model, str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantizer's advice off stderr: it is about steps that are taken anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def quantize_and_compare(
    content: bytes,
    model: nn.Module,
    preprocessing: Preprocessing,
    options: ExportOptions,
    log: Callable[[str], None],
) -> tuple[bytes, Runner, Quantization]:
    """Quantize an ONNX file, except for layers with outliers, and compare the result with float32."""
    searched, held_out, description = _images(preprocessing, options)
    threads = options.threads or torch.get_num_threads()
    fragile = layers_with_outliers(content, searched[:_OUTLIER_BATCHES])
    calibration = searched if options.quantization == "static" else ()
    made = quantize(content, calibration=calibration, reduce_range=options.reduce_range, exclude=fragile)
    run = onnx_runner(made, threads)
    expected, actual = (torch.cat([program(batch) for batch in held_out]) for program in (model, run))
    slow, fast = _times(onnx_runner(content, threads), run, preprocessing, options)
    result = Quantization(
        method=options.quantization,
        reduce_range=options.reduce_range,
        float32_layers=tuple(fragile.values()),
        compared_on=description,
        agreement=agreement(expected, actual, classes=gives_probabilities(model)),
        float32_bytes=len(content),
        float32_ms=1000 * statistics.median(slow),
        int8_ms=1000 * statistics.median(fast),
        speedup=statistics.median(a / b for a, b in zip(slow, fast, strict=True)),
        threads=threads,
    )
    if result.far:
        log(_advice(result, options))
    return made, run, result


def _times(
    exact: Runner, quantized: Runner, preprocessing: Preprocessing, options: ExportOptions
) -> list[list[float]]:
    """Return the CPU seconds per image of both, in turns. Other programs add to wall time, not to these."""
    images = fixed_images(options.fixed_batch or 1, preprocessing.input_size)
    # In turns, since a CPU that warms up or is shared slows down whichever would be second.
    runs = [run_of(exact, images), run_of(quantized, images)]
    times = take_turns(runs, seconds=_SECONDS, device=torch.device("cpu"), clock=time.process_time)
    return [[seconds / len(images) for seconds in per_run] for per_run in times]


def _images(preprocessing: Preprocessing, options: ExportOptions) -> tuple[list[Tensor], list[Tensor], str]:
    """Return batches to find outliers and ranges on, batches to compare on, and a description of these."""
    size = options.fixed_batch or _BATCH
    if not options.has_images:
        count = max(_NOISE_IMAGES // size, 1) * size
        noise = list(fixed_images(count, preprocessing.input_size).split(size))
        about = f"{count} images of noise, which say little about real ones; give {option_name('data_dir')}"
        return noise, noise, about
    data = DataOptions(data_dir=options.data_dir, dataset=options.dataset, train_split=options.train_split)
    chosen: CalibrationImages = calibration_images(
        preprocessing, data, count=options.calibration_images, seed=_SEED, use_labels=False
    )
    # Ranges fit the images that they were found on; only others show what clipping costs.
    held_out = max(round(_HELD_OUT * len(chosen.images)), 1)
    searched, compared = (
        [batch for batch in part.split(size) if options.fixed_batch in (None, len(batch))]
        for part in (chosen.images[held_out:], chosen.images[:held_out])
    )
    if not searched or not compared:
        raise MhacutError(
            f"{option_name('int8', True)}: {len(chosen.images)} images are too few to compare on a part of "
            f"them in batches of {size}; give more, or none"
        )
    return searched, compared, f"{sum(map(len, compared))} held-out of {chosen.description}"


def _advice(result: Quantization, options: ExportOptions) -> str:
    """Return the line that says that INT8 is far off, and what may help."""
    kl = result.agreement.kl
    off = f"cosine {result.agreement.cosine:.3f}" if kl is None else f"KL divergence {kl:.3g} nats"
    ways = []
    if not options.has_images:
        ways.append(f"compare on images ({option_name('data_dir')}): noise is no fair test")
    if result.method == "static":
        ways.append(option_name("quantization", "dynamic"))
    if not result.reduce_range:
        ways.append(f"{option_name('reduce_range', True)} if this CPU has no VNNI")
    ways.append("keep float32")
    return f"the INT8 model is far from float32 ({off}); what may help: {', or '.join(ways)}"


def layers_with_outliers(content: bytes, batches: Sequence[Tensor]) -> dict[str, str]:
    """Return the layers that should stay float32: the name of the module of each, by that of its node.

    They are those whose inputs, rounded to the 256 values that ONNX Runtime's dynamic quantization gives all
    tokens of a batch, make too large an error in any batch.

    Args:
        content: a float32 ONNX file.
        batches: images, [B, C, H, W] each.
    """
    import onnx
    import onnxruntime

    model = onnx.load_from_string(content)
    weights = {one.name: one for one in model.graph.initializer}
    nodes = _linear_nodes(model)
    inputs = list(dict.fromkeys(node.input[0] for node in nodes))  # q, k and v read the same tensor
    del model.graph.output[:]  # the inputs of all linear layers become the outputs of the graph
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in inputs)
    fragile = set()
    with refusing_int8():
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        for batch in batches:
            values = dict(zip(inputs, session.run(inputs, {INPUT: batch.numpy()}), strict=True))
            for node in nodes:
                weight = onnx.numpy_helper.to_array(weights[node.input[1]])
                transposed = any(item.name == "transB" and item.i for item in node.attribute)
                error = rounding_error(values[node.input[0]], weight.T if transposed else weight)
                if not error <= TOO_MUCH:  # NaN, of values that overflow, is too much as well
                    fragile.add(node.name)
    return {node.name: _module_name(node) for node in nodes if node.name in fragile}


def rounding_error(x: Any, weight: Any) -> float:
    """Return the relative squared error of ``x`` [..., n] times ``weight`` [n, m] for quantized ``x``.

    It is the mean over tokens of ||W (q(x) - x)||^2 / ||W x||^2, where q rounds to 256 values.
    """
    low, high = min(x.min(), 0), max(x.max(), 0)
    step = max((high - low) / _LEVELS, 1e-30)  # all values may be 0
    zero = np.round(-low / step)  # the level of 0, which must be exact: padding and ReLU give it
    rounded = (np.clip(np.round(x / step) + zero, 0, _LEVELS) - zero) * step
    # In the output, not the input: an outlier that the weights ignore does no harm.
    off, exact = (rounded - x) @ weight, x @ weight
    return float(((off**2).sum(-1) / ((exact**2).sum(-1) + 1e-30)).mean())


def _linear_nodes(model: Any) -> list[Any]:
    """Return the nodes of an ONNX model that multiply by constant weights."""
    constant = {one.name for one in model.graph.initializer}
    return [
        node for node in model.graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in constant
    ]


def _module_name(node: Any) -> str:
    """Return the name of the module that a node comes from; the node's own if that is not stated."""
    for item in node.metadata_props:
        if item.key == _SCOPES:
            *modules, _ = ast.literal_eval(item.value)
            return str(modules[-1]) if modules else str(node.name)
    return str(node.name)
