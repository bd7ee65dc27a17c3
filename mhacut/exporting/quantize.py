"""Quantize an ONNX file to INT8 with ONNX Runtime's dynamic quantizer, and compare it with float32.

Each output channel of a weight has its own scale. Ranges of activations are found while the file runs.
"""

# Static ranges, fixed beforehand on images, were no better: on a ViT-Ti with 430 ImageNet classes, KL was
# 0.011 nats (dynamic: 0.007), and size and time of one image were the same within 1 %.

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
from mhacut.options.export import ExportOptions
from mhacut.surgery.find import gives_probabilities

_QUANTIZED_OPERATORS = ["MatMul", "Gemm"]
"""ONNX operators that become INT8 if their second input is a constant weight. Convolutions stay float32,
because INT8 with dynamic ranges makes them slower."""
FAR_KL, FAR_COSINE = 0.1, 0.98
"""Limits for the warning that an INT8 model is far from float32: largest KL divergence of the logits (nats),
or smallest cosine of the features."""
MAX_ROUNDING_ERROR = 0.01
"""Largest relative squared error that rounding a linear layer's inputs to 8 bits may cause in its outputs.
Above, the layer stays float32. Layers with outlier activations (Sun et al., arXiv 2402.17762) are 10 times
above, other layers of ViTs 100 times below."""
_LEVELS = 255
_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key of an ONNX node under which torch stores the names of the node's modules."""
_HELD_OUT = 0.25
_NOISE_IMAGES = 32
_BATCH = 8
_OUTLIER_BATCHES = 2
_SECONDS = 2.0
_SEED = 42


@dataclass(frozen=True)
class Quantization:
    """Comparison of an INT8 ONNX file with the float32 file of the same model."""

    float32_layers: tuple[str, ...]
    """Names of linear layers that stay float32 because their inputs have outliers."""
    compared_on: str
    """Text about the images on which the INT8 and float32 outputs were compared."""
    agreement: Agreement
    float32_bytes: int
    float32_ms: float
    """Median CPU time per image of the float32 file in milliseconds, summed over threads."""
    int8_ms: float
    """Median CPU time per image of the INT8 file in milliseconds, summed over threads."""
    speedup: float
    """Median over timing rounds of the float32 time divided by the INT8 time."""
    threads: int

    @property
    def far(self) -> bool:
        """Whether the INT8 outputs differ from the float32 outputs by more than FAR_KL or FAR_COSINE."""
        kl, cosine = self.agreement.kl, self.agreement.cosine
        return not (cosine >= FAR_COSINE if kl is None else kl <= FAR_KL)


class NothingToQuantizeError(MhacutError):
    """Raised for an ONNX model without a linear layer that ONNX Runtime can quantize."""


def _refusing_int8() -> AbstractContextManager[None]:
    return refusing(f"{option_name('int8', True)}: ONNX Runtime fails", "without it, the model stays float32")


def quantize(content: bytes, *, exclude: Collection[str] = ()) -> bytes:
    """Convert the linear layers of a float32 ONNX file to INT8, except nodes with names in ``exclude``."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = onnx.load_from_string(content)
    linear = {node.name for node in _linear_nodes(model)}.difference(exclude)
    excluded = [
        node.name
        for node in model.graph.node
        if node.op_type in _QUANTIZED_OPERATORS and node.name not in linear
    ]
    with tempfile.TemporaryDirectory() as folder, _quiet(), _refusing_int8():
        exact, prepared, written = (Path(folder, f"{name}.onnx") for name in ("exact", "prepared", "int8"))
        exact.write_bytes(content)
        # Symbolic shape inference would need names for the sizes of the batch.
        quant_pre_process(str(exact), str(prepared), skip_symbolic_shape=True)
        _forget_shapes_of_weights(prepared)
        quantize_dynamic(
            str(prepared),
            str(written),
            op_types_to_quantize=_QUANTIZED_OPERATORS,
            # The quantizer first turns a Gemm into a MatMul with this suffix.
            nodes_to_exclude=[*excluded, *(f"{name}_MatMul" for name in excluded)],
            per_channel=True,  # costs no time: the scale is applied after the sum over inputs
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
        quantized = onnx.load(str(written))
    matrices = (tensor for tensor in quantized.graph.initializer if len(tensor.dims) > 1)
    if not any(tensor.data_type == onnx.TensorProto.INT8 for tensor in matrices):
        raise NothingToQuantizeError(
            f"{option_name('int8', True)}: the model has no linear layer that ONNX Runtime can quantize; "
            "nothing was written. Export it in float32"
        )
    for item in quantized.metadata_props:
        if item.key == METADATA:
            about = {**json.loads(item.value), "int8": {"activations": "dynamic"}}
            item.value = json.dumps(about, sort_keys=True)
    result: bytes = quantized.SerializeToString()
    return result


def _forget_shapes_of_weights(path: Path) -> None:
    # onnxruntime 1.23, the last version for Python 3.10, transposes weights without updating their shapes in
    # value_info, and onnx 1.23 refuses the contradiction.
    import onnx

    model = onnx.load(str(path))
    weights = {tensor.name for tensor in model.graph.initializer}
    others = [info for info in model.graph.value_info if info.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(others)
    onnx.save(model, str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    # The quantizer recommends preprocessing, which was done.
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
    """Return the INT8 file of a float32 ONNX file, a function that runs it, and the comparison of both."""
    searched, held_out, description = _images(preprocessing, options)
    threads = options.threads or torch.get_num_threads()
    outlier_layers = layers_with_outliers(content, searched[:_OUTLIER_BATCHES])
    quantized = quantize(content, exclude=outlier_layers)
    run = onnx_runner(quantized, threads)
    expected, actual = (torch.cat([program(batch) for batch in held_out]) for program in (model, run))
    slow, fast = _times(onnx_runner(content, threads), run, preprocessing, options)
    result = Quantization(
        float32_layers=tuple(outlier_layers.values()),
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
    return quantized, run, result


def _times(
    exact: Runner, quantized: Runner, preprocessing: Preprocessing, options: ExportOptions
) -> list[list[float]]:
    """Return the CPU seconds per image of ``exact`` and of ``quantized`` in each round."""
    images = fixed_images(options.fixed_batch or 1, preprocessing.input_size)
    # In turns: a CPU that warms up or is shared would slow down the second file. CPU time, unlike wall
    # time, ignores other programs.
    runs = [run_of(exact, images), run_of(quantized, images)]
    times = take_turns(runs, seconds=_SECONDS, device=torch.device("cpu"), clock=time.process_time)
    return [[seconds / len(images) for seconds in per_run] for per_run in times]


def _images(preprocessing: Preprocessing, options: ExportOptions) -> tuple[list[Tensor], list[Tensor], str]:
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
    held_out = max(round(_HELD_OUT * len(chosen.images)), 1)
    searched, compared = (
        [batch for batch in part.split(size) if options.fixed_batch in (None, len(batch))]
        for part in (chosen.images[held_out:], chosen.images[:held_out])
    )
    if not searched or not compared:
        raise MhacutError(
            f"{option_name('int8', True)}: {len(chosen.images)} images are too few for a comparison on "
            f"{_HELD_OUT:.0%} of them in batches of {size}; give more images, or no images"
        )
    return searched, compared, f"{sum(map(len, compared))} held-out of {chosen.description}"


def _advice(result: Quantization, options: ExportOptions) -> str:
    kl = result.agreement.kl
    distance = f"cosine {result.agreement.cosine:.3f}" if kl is None else f"KL divergence {kl:.3g} nats"
    advice = "keep float32"
    if not options.has_images:
        advice = f"compare on real images ({option_name('data_dir')}), or {advice}"
    return f"the INT8 model is far from float32 ({distance}); {advice}"


def layers_with_outliers(content: bytes, batches: Sequence[Tensor]) -> dict[str, str]:
    """Return {ONNX node: module} of linear layers whose rounding error exceeds MAX_ROUNDING_ERROR.

    ``batches`` are images [B, C, H, W]. As in ONNX Runtime, all tokens of a batch are rounded to the same 256
    levels.
    """
    import onnx
    import onnxruntime

    model = onnx.load_from_string(content)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = _linear_nodes(model)
    inputs = list(dict.fromkeys(node.input[0] for node in nodes))  # q, k and v read the same tensor
    del model.graph.output[:]  # the inputs of all linear layers become the outputs of the graph
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in inputs)
    outlier_nodes = set()
    with _refusing_int8():
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        for batch in batches:
            values = dict(zip(inputs, session.run(inputs, {INPUT: batch.numpy()}), strict=True))
            for node in nodes:
                weight = onnx.numpy_helper.to_array(weights[node.input[1]])
                transposed = any(item.name == "transB" and item.i for item in node.attribute)
                error = rounding_error(values[node.input[0]], weight.T if transposed else weight)
                if not error <= MAX_ROUNDING_ERROR:  # also NaN, from values that overflow
                    outlier_nodes.add(node.name)
    return {node.name: _module_name(node) for node in nodes if node.name in outlier_nodes}


def rounding_error(x: Any, weight: Any) -> float:
    """Return the relative squared error of ``x @ weight`` if ``x`` [..., n] is rounded to 256 levels.

    The error is the mean over tokens of ||W (q(x) - x)||^2 / ||W x||^2, where q is the rounding.
    """
    low, high = min(x.min(), 0), max(x.max(), 0)
    step = max((high - low) / _LEVELS, 1e-30)  # all values may be 0
    zero = np.round(-low / step)  # 0 has a level of its own: padding and ReLU must stay exact
    rounded = (np.clip(np.round(x / step) + zero, 0, _LEVELS) - zero) * step
    # The error is measured in the output: an outlier that the weights ignore does no harm.
    error, exact = (rounded - x) @ weight, x @ weight
    return float(((error**2).sum(-1) / ((exact**2).sum(-1) + 1e-30)).mean())


def _linear_nodes(model: Any) -> list[Any]:
    constant = {tensor.name for tensor in model.graph.initializer}
    return [
        node
        for node in model.graph.node
        if node.op_type in _QUANTIZED_OPERATORS and node.input[1] in constant
    ]


def _module_name(node: Any) -> str:
    """Return the name of the module from which torch exported ``node``, or else the name of ``node``."""
    for item in node.metadata_props:
        if item.key == _SCOPES:
            *modules, _ = ast.literal_eval(item.value)
            return str(modules[-1]) if modules else str(node.name)
    return str(node.name)
