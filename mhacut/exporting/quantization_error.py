"""Find the layers of an ONNX file whose inputs have outliers that INT8 cannot hold."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mhacut.exporting.runtimes import INPUT, refusing_int8

_LEVELS = 255
_SCOPES = "pkg.torch.onnx.name_scopes"
"""Key under which torch's exporter keeps the names of the modules that a node comes from."""
TOO_MUCH = 0.01
"""Relative squared error of a layer's outputs above which it stays float32. ViTs have massive activations
(Sun et al., arXiv 2402.17762): one value of a token, hundreds of times the others, sets the step for all.
The errors of layers without such outliers are two orders of magnitude below this, of those with them one
above."""


def linear_nodes(model: Any) -> list[Any]:
    """Return the nodes of an ONNX model that multiply by constant weights."""
    constant = {one.name for one in model.graph.initializer}
    return [
        node for node in model.graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in constant
    ]


def module_name(node: Any) -> str:
    """Return the name of the module that a node comes from; the node's own if that is not stated."""
    for item in node.metadata_props:
        if item.key == _SCOPES:
            *modules, _ = ast.literal_eval(item.value)
            return str(modules[-1]) if modules else str(node.name)
    return str(node.name)


def quantization_errors(content: bytes, images: Tensor) -> dict[str, float]:
    """Return the error that INT8 inputs make in each linear layer, by the name of its node.

    It is the mean over tokens of ||W (q(x) - x)||^2 / ||W x||^2, where q rounds to the 256 values that
    ONNX Runtime's dynamic quantization gives all tokens of an image.

    Args:
        content: a float32 ONNX file.
        images: [B, C, H, W], a few.
    """
    import onnx
    import onnxruntime

    model = onnx.load_from_string(content)
    weights = {one.name: one for one in model.graph.initializer}
    nodes = linear_nodes(model)
    inputs = list(dict.fromkeys(node.input[0] for node in nodes))
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in inputs)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values = dict(zip(inputs, session.run(inputs, {INPUT: images.numpy()}), strict=True))
    errors = {}
    for node in nodes:
        weight = onnx.numpy_helper.to_array(weights[node.input[1]])
        transposed = any(item.name == "transB" and item.i for item in node.attribute)
        errors[node.name] = _error(values[node.input[0]], weight.T if transposed else weight)
    return errors


def _error(x: Any, weight: Any) -> float:
    """Return the relative squared error of ``x`` [..., n] times ``weight`` [n, m] for quantized ``x``."""
    low, high = min(x.min(), 0), max(x.max(), 0)
    step = max((high - low) / _LEVELS, 1e-30)
    zero = np.round(-low / step)
    rounded = (np.clip(np.round(x / step) + zero, 0, _LEVELS) - zero) * step
    off, exact = (rounded - x) @ weight, x @ weight
    return float(((off**2).sum(-1) / ((exact**2).sum(-1) + 1e-30)).mean())


def layers_with_outliers(content: bytes, batches: Sequence[Tensor]) -> dict[str, str]:
    """Return the layers that should stay float32: the name of the module of each, by that of its node.

    Args:
        content: a float32 ONNX file.
        batches: images, [B, C, H, W] each; a layer's largest error over the batches counts.
    """
    import onnx

    worst: dict[str, float] = {}
    for batch in batches:
        with refusing_int8():
            errors = quantization_errors(content, batch)
        for name, error in errors.items():
            worst[name] = max(error, worst.get(name, 0.0))
    nodes = {node.name: node for node in linear_nodes(onnx.load_from_string(content))}
    return {name: module_name(nodes[name]) for name, error in worst.items() if not error <= TOO_MUCH}
