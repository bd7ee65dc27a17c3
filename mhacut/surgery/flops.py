"""What a model costs: fvcore's count of the whole, and a table that knows it for any widths.

One FLOP is one multiply-accumulate, attention products included, as fvcore and the papers count:
DeiT-T/S/B are 1.26 / 4.61 / 17.58 G.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mhacut.adapters.base import Layer
from mhacut.errors import UnsupportedModelError
from mhacut.surgery.find import PrunableLayers, UnitKey

# Operators without multiply-accumulates worth counting. An operator that is neither here nor known to fvcore
# is an error: silently counting attention as 0 is how other tools report wrong FLOPs.
_NEGLIGIBLE_NAMES = """
abs add add_ addcmul amax cat ceil clamp clamp_min clone col2im constant_pad_nd copy_ cos cumsum div div_
dropout dropout_ exp expand_as feature_dropout fill_ flip gelu gelu_ hardswish hardswish_ hardtanh im2col
index_select linalg_vector_norm log masked_fill max max_pool2d mean meshgrid min movedim mT mul mul_ neg ne
new_zeros norm one_hot ones_like pad pixel_shuffle pow reciprocal relu relu_ repeat repeat_interleave
reshape_as rms_norm rsqrt rsub scalar_tensor sigmoid sigmoid_ silu silu_ sin softmax softplus sqrt square
stack sub sub_ sum tanh tile triu_ unflatten unfold var where zeros_like
"""
_NEGLIGIBLE = frozenset(f"aten::{name}" for name in _NEGLIGIBLE_NAMES.split())

# Per element of input and of output, for operators whose nearest kin fvcore counts: pooling as its
# adaptive_avg_pool2d, resampling by the neighbours of a point as its upsample_bilinear2d.
_PER_ELEMENT = {
    "aten::avg_pool1d": (1, 0),
    "aten::avg_pool2d": (1, 0),
    "aten::upsample_linear1d": (0, 2),
    "aten::_upsample_bilinear2d_aa": (0, 4),
    "aten::upsample_bicubic2d": (0, 16),
    "aten::_upsample_bicubic2d_aa": (0, 16),
}


def measure_flops(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """FLOPs of one image through ``model``, counted by fvcore.

    Arguments and errors as for :func:`measure_flops_by_module`.
    """
    return measure_flops_by_module(model, input_size)[""]


def measure_flops_by_module(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, int]:
    """FLOPs of one image through each module of ``model``, by name; the model itself is ``""``.

    Args:
        model: in eval mode, on any device.
        input_size: [C, H, W].

    Raises:
        UnsupportedModelError: an operator neither counted nor known to be negligible.
    """
    with warnings.catch_warnings():
        # fvcore stands on torch.jit.trace, which torch has deprecated; there is no release without it.
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis
        from fvcore.nn.jit_handles import elementwise_flop_counter

        parameter = next(model.parameters())
        image = torch.zeros((1, *input_size), dtype=parameter.dtype, device=parameter.device)
        analysis = FlopCountAnalysis(model, image)
        analysis.set_op_handle("aten::scaled_dot_product_attention", _count_sdpa)
        analysis.set_op_handle("aten::einsum", _count_einsum)
        for name, (per_input, per_output) in _PER_ELEMENT.items():
            analysis.set_op_handle(name, elementwise_flop_counter(per_input, per_output))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
        with torch.no_grad():
            counted = {name: int(count) for name, count in analysis.by_module().items()}
        uncounted = sorted(set(analysis.unsupported_ops()) - _NEGLIGIBLE)
    if uncounted:
        raise UnsupportedModelError(
            f"FLOPs of {type(model).__name__} cannot be counted: fvcore does not know {', '.join(uncounted)}"
        )
    return counted


def weightless(model: nn.Module) -> nn.Module:
    """A copy of ``model``, which may be on the meta device, that runs on the CPU and takes no memory.

    All its tensors are zeros that are stored once: what it computes means nothing, what that costs can be
    counted. Tracing a model on the meta device fails in torch's own shape checks.
    """
    stand_in = copy.deepcopy(model)
    for module in stand_in.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            module.register_parameter(name, nn.Parameter(zeros, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            zeros = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
            module.register_buffer(name, zeros, persistent=name not in module._non_persistent_buffers_set)
    return stand_in.eval()


def _count_sdpa(inputs: list[Any], outputs: list[Any]) -> int:
    """Q k^T and A v: B * H * L * S * (E + Ev)."""
    query, key, value = (tuple(tensor.type().sizes()) for tensor in inputs[:3])
    rows = 1
    for size in query[:-1]:
        rows *= size
    return int(rows * key[-2] * (query[-1] + value[-1]))


def _count_einsum(inputs: list[Any], outputs: list[Any]) -> int:
    """Of a product of two tensors, the sizes of all its indices; fvcore's own count is to four digits."""
    terms = inputs[0].toIValue().replace(" ", "").partition("->")[0].split(",")
    shapes = [tuple(tensor.type().sizes()) for tensor in inputs[1].node().inputs()]
    assert len(terms) == len(shapes) == 2
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        sizes.update(zip(term, shape, strict=True))
    return math.prod(sizes.values())


@dataclass(frozen=True)
class LayerCost:
    """FLOPs of one layer as a function of its widths; exact, and differentiable when widths are tensors."""

    layer: Layer
    input_shapes: tuple[tuple[int, ...], ...]
    """Of the layer's input for one image, once for every time that the layer runs."""
    module: nn.Module

    def flops(self, widths: Mapping[UnitKey, Any]) -> Any:
        own = {unit.kind: widths.get(unit.key, unit.width) for unit in self.layer.units}
        return sum(self.layer.adapter.flops(self.module, shape, own) for shape in self.input_shapes)


@dataclass(frozen=True)
class CostTable:
    """FLOPs of a model at any widths of its units."""

    fixed: int
    """What no width changes."""
    layers: tuple[LayerCost, ...]
    dense: int
    """What the model costs as it stands, counted by fvcore."""

    def flops(self, widths: Mapping[UnitKey, Any]) -> Any:
        """Total at ``widths`` (channels per head; units not named stay as they are)."""
        total: Any = self.fixed
        for layer in self.layers:
            total = total + layer.flops(widths)
        return total

    def by_layer(self) -> dict[str, int]:
        """FLOPs of what can be cut, per layer, as it stands."""
        return {cost.layer.name: int(cost.flops({})) for cost in self.layers}


def build_cost_table(
    model: nn.Module, prunable: PrunableLayers, input_size: tuple[int, int, int]
) -> CostTable:
    """Count ``model`` once and learn the input shapes of every layer.

    Args:
        model: eval mode.
        prunable: of ``model``.
        input_size: [C, H, W].
    """
    shapes: dict[str, list[tuple[int, ...]]] = {}
    handles = []
    for layer in prunable.layers:
        module = model.get_submodule(layer.name)
        handles.append(module.register_forward_pre_hook(_note_shape(shapes, layer.name)))
    try:
        parameter = next(model.parameters())
        with torch.no_grad():
            model(torch.zeros((1, *input_size), dtype=parameter.dtype, device=parameter.device))
    finally:
        for handle in handles:
            handle.remove()
    layers = tuple(
        LayerCost(layer, tuple(shapes[layer.name]), model.get_submodule(layer.name))
        for layer in prunable.layers
        if layer.name in shapes
    )
    dense = measure_flops(model, input_size)
    return CostTable(dense - sum(int(cost.flops({})) for cost in layers), layers, dense)


def _note_shape(shapes: dict[str, list[tuple[int, ...]]], name: str) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        shapes.setdefault(name, []).append(tuple(args[0].shape))

    return hook


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
