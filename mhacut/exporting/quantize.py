"""Quantize an ONNX file to INT8 by ONNX Runtime's own quantizer, and compare it with float32."""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mhacut.data import CalibrationImages, Preprocessing, calibration_images
from mhacut.errors import MhacutError, option_name
from mhacut.exporting.quantization_error import layers_with_outliers, linear_nodes
from mhacut.exporting.runtimes import INPUT, METADATA, Runner, onnx_file_runner, refusing_int8
from mhacut.measuring.agreement import Agreement, agreement
from mhacut.measuring.latency import fixed_images, run_of, take_turns
from mhacut.options.base import DataOptions
from mhacut.options.export import ExportOptions
from mhacut.surgery.find import gives_probabilities

Method = Literal["dynamic", "static"]

_LINEAR = ["MatMul", "Gemm"]
"""Operators that are quantized. Softmax, LayerNorm and GELU stay float32, as do convolutions, which are one
patch embedding in a ViT and slower in INT8 than in float32 where ranges are dynamic. Products of activations
(queries and keys, attention and values) stay float32 too: only a constant second factor is quantized."""
FAR_KL, FAR_COSINE = 0.1, 0.98
"""KL divergence in nats above which, or cosine below which without classes, an INT8 model is far off."""
_HELD_OUT = 0.25
_NOISE_IMAGES = 32
_BATCH = 8
_OUTLIER_BATCHES = 2
_SECONDS = 2.0
_SEED = 42


@dataclass(frozen=True)
class Quantization:
    """Manner in which an INT8 file was made, and its comparison with float32."""

    method: Method
    reduce_range: bool
    float32_layers: tuple[str, ...]
    """Linear layers that stay float32, because outliers of their inputs would take up the range of INT8."""
    compared_on: str
    """Description of the images of the comparison; ranges of activations were found on others."""
    agreement: Agreement
    """Agreement with the float32 model."""
    others: dict[str, Agreement]
    """Agreement of each other method that was tried, by its name."""
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
        """Whether the INT8 model is far off."""
        return is_far(self.agreement)


def is_far(found: Agreement) -> bool:
    """Whether outputs differ too much from those of the original model to be of use."""
    return not (found.cosine >= FAR_COSINE if found.kl is None else found.kl <= FAR_KL)


def quantize(
    content: bytes,
    method: Method,
    *,
    calibration: Sequence[Tensor] = (),
    reduce_range: bool = False,
    exclude: Collection[str] = (),
) -> bytes:
    """Return an ONNX file with the weights of its linear layers in INT8, a scale for each output channel.

    Args:
        content: a float32 ONNX file.
        method: ``dynamic`` finds the ranges of activations as the file runs, ``static`` beforehand.
        calibration: batches of images to find them on, [B, C, H, W] float32, for ``static``.
        reduce_range: round weights to 7 bits, for CPUs without VNNI, where products of 8 bits overflow.
        exclude: names of nodes that stay float32.

    Raises:
        NothingToQuantizeError: nothing in the file can be quantized.
        MhacutError: the quantizer fails.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = onnx.load_from_string(content)
    linear = {node.name for node in linear_nodes(model)}.difference(exclude)
    left = [node.name for node in model.graph.node if node.op_type in _LINEAR and node.name not in linear]
    shared: dict[str, Any] = {
        "op_types_to_quantize": _LINEAR,
        # The dynamic quantizer makes a MatMul of a Gemm first.
        "nodes_to_exclude": [*left, *(f"{name}_MatMul" for name in left)],
        "per_channel": True,
        "reduce_range": reduce_range,
        "weight_type": QuantType.QInt8,
        # Without the second, a static file rounds what goes into the residual stream too.
        "extra_options": {"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": _LINEAR},
    }
    with tempfile.TemporaryDirectory() as folder, _quiet_quantizer(), refusing_int8():
        exact, prepared, written = (Path(folder, f"{name}.onnx") for name in ("exact", "prepared", "int8"))
        exact.write_bytes(content)
        # Shapes of the batch are symbols, which its other pass would need names for.
        quant_pre_process(str(exact), str(prepared), skip_symbolic_shape=True)
        _forget_shapes_of_weights(prepared)
        if method == "dynamic":
            quantize_dynamic(str(prepared), str(written), **shared)
        else:
            unsigned = QuantType.QUInt8  # what the kernels of x86 multiply with signed weights
            quantize_static(
                str(prepared), str(written), _Reader(calibration), activation_type=unsigned, **shared
            )
        made = onnx.load(str(written))
    _require_int8(made)
    for item in made.metadata_props:
        if item.key == METADATA:
            about = {**json.loads(item.value), "int8": {"activations": method, "reduce_range": reduce_range}}
            item.value = json.dumps(about, sort_keys=True)
    quantized: bytes = made.SerializeToString()
    return quantized


class NothingToQuantizeError(MhacutError):
    """An ONNX model without a linear layer that ONNX Runtime can quantize."""


def _require_int8(made: Any) -> None:
    """Raise a :class:`NothingToQuantizeError` unless an ONNX model has matrices in INT8."""
    import onnx

    matrices = (one for one in made.graph.initializer if len(one.dims) > 1)
    if not any(one.data_type == onnx.TensorProto.INT8 for one in matrices):
        raise NothingToQuantizeError(
            f"{option_name('int8', True)}: the model has no linear layer that ONNX Runtime can quantize; "
            "nothing was written. Export it in float32"
        )


class _Reader:
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
    kept = [info for info in model.graph.value_info if info.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    onnx.save(model, str(path))


@contextmanager
def _quiet_quantizer() -> Iterator[None]:
    """Keep the quantizer's advice off stderr: it is about steps that are taken anyway."""
    root = logging.getLogger()
    handler = logging.NullHandler()  # without any, logging.warning() would install one for good
    root.addHandler(handler)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
        root.removeHandler(handler)


def quantize_best(
    content: bytes,
    model: nn.Module,
    preprocessing: Preprocessing,
    options: ExportOptions,
    log: Callable[[str], None],
) -> tuple[bytes, Runner, Quantization]:
    """Quantize by the method asked for, or by the one closer to float32, and compare the result with float32.

    Args:
        content: the float32 ONNX file.
        model: the model that it was made from.
        preprocessing: preprocessing of the images.
        options: options of the command.
        log: receives a message if the result is far from float32.

    Returns:
        The INT8 file, a runner of it, and what was measured.

    Raises:
        MhacutError: nothing in the file can be quantized, or there are too few images.
    """
    calibration, held_out, description = _images(preprocessing, options)
    threads = options.threads or torch.get_num_threads()
    methods: list[Method] = ["dynamic", "static"] if calibration else ["dynamic"]
    if options.quantization != "auto":
        methods = [options.quantization]
    fragile = layers_with_outliers(content, (calibration or held_out)[:_OUTLIER_BATCHES])
    expected = torch.cat([model(batch) for batch in held_out])
    tried: dict[Method, tuple[bytes, Runner, Agreement]] = {}
    for method in methods:
        reduce_range = options.reduce_range
        made = quantize(content, method, calibration=calibration, reduce_range=reduce_range, exclude=fragile)
        run = onnx_file_runner(made, threads)
        found = torch.cat([run(batch) for batch in held_out])
        tried[method] = made, run, agreement(expected, found, classes=gives_probabilities(model))
    best = min(tried, key=lambda method: _distance(tried[method][2]))
    made, run, agreed = tried[best]
    slow, fast = _times(onnx_file_runner(content, threads), run, preprocessing, options)
    result = Quantization(
        method=best,
        reduce_range=options.reduce_range,
        float32_layers=tuple(fragile.values()),
        compared_on=description,
        agreement=agreed,
        others={method: one[2] for method, one in tried.items() if method != best},
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
    runs = [run_of(exact, images), run_of(quantized, images)]
    cpu = torch.device("cpu")
    times = take_turns(runs, seconds=_SECONDS, device=cpu, clock=time.process_time)
    return [[seconds / len(images) for seconds in own] for own in times]


def _distance(found: Agreement) -> float:
    distance = 1 - found.cosine if found.kl is None else found.kl
    return distance if distance == distance else float("inf")


def _images(preprocessing: Preprocessing, options: ExportOptions) -> tuple[list[Tensor], list[Tensor], str]:
    """Return batches to calibrate on, batches to compare on, and a description of the latter."""
    size = options.fixed_batch or _BATCH
    if not options.data.has_images:
        count = max(_NOISE_IMAGES // size, 1) * size
        noise = fixed_images(count, preprocessing.input_size)
        about = f"{count} images of noise, which say little about real ones; give {option_name('data_dir')}"
        return [], list(noise.split(size)), about
    data = DataOptions(
        data_dir=options.data.data_dir, dataset=options.data.dataset, train_split=options.data.train_split
    )
    chosen: CalibrationImages = calibration_images(
        preprocessing, data, count=options.data.calibration_images, seed=_SEED, use_labels=False
    )
    held_out = max(round(_HELD_OUT * len(chosen.images)), 1)
    parts = [chosen.images[held_out:].split(size), chosen.images[:held_out].split(size)]
    if options.fixed_batch is not None:
        parts = [tuple(batch for batch in part if len(batch) == size) for part in parts]
    calibrate, compare = map(list, parts)
    if not calibrate or not compare:
        raise MhacutError(
            f"{option_name('int8', True)}: {len(chosen.images)} images are too few to calibrate on some and "
            f"compare on others in batches of {size}; give more, or none"
        )
    return calibrate, compare, f"{sum(map(len, compare))} held-out of {chosen.description}"


def _advice(result: Quantization, options: ExportOptions) -> str:
    """Return the line that says that INT8 is far off, and what may help."""
    found = result.agreement
    off = f"cosine {found.cosine:.3f}"
    if found.kl is not None and found.same_answer is not None:
        same = f"the same top-1 class for {100 * found.same_answer:.0f} % of the images"
        off = f"KL divergence {found.kl:.3g} nats, {same}"
    ways = []
    if not options.data.has_images:
        ways.append(f"compare on images ({option_name('data_dir')}): noise is no fair test")
    if result.method == "static":
        ways.append(option_name("quantization", "dynamic"))
    if not result.reduce_range:
        ways.append(f"{option_name('reduce_range', True)} if this CPU has no VNNI")
    ways.append("keep float32")
    return f"the INT8 model is far from float32 ({off}); what may help: {', or '.join(ways)}"
