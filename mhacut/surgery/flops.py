"""FLOPs of a model, counted by fvcore.

One FLOP is one multiply-accumulate, attention products included, as fvcore and the papers count:
DeiT-T/S/B are 1.26 / 4.61 / 17.58 G.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mhacut.errors import UnsupportedModelError

# Operators without multiply-accumulates worth counting. An operator that is neither here nor known to fvcore
# is an error: silently counting attention as 0 is how other tools report wrong FLOPs.
_NEGLIGIBLE_NAMES = """
abs abs_ add add_ addcmul amax argsort bitwise_not cat ceil clamp clamp_min clone col2im constant_pad_nd
copy_ cos cumsum div div_ dropout dropout_ embedding eq exp expand_as feature_dropout fill_ flip gelu gelu_
hardswish hardswish_ hardtanh im2col index_select linalg_vector_norm log lt masked_fill masked_fill_ max
max_pool2d mean meshgrid min movedim mT mul mul_ ne neg new_ones new_zeros norm numel one_hot ones_like pad
pixel_shuffle pow prod rand rand_like randn reciprocal relu relu_ repeat repeat_interleave reshape_as
rms_norm round rsqrt rsub scalar_tensor scatter sigmoid sigmoid_ silu silu_ sin softmax softplus sqrt square
stack sub sub_ sum tanh tile topk triu_ unflatten unfold var where zero_ zeros_like
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


def measure_flops(model: nn.Module, input_size: tuple[int, ...]) -> int:
    return measure_flops_by_module(model, input_size)[""]


def executed_flops(run: Callable[[], object]) -> int:
    """Count the multiply-accumulates of matrix products in ``run()``, including zero padding."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return int(counter.get_total_flops()) // 2


def measure_flops_by_module(model: nn.Module, input_size: tuple[int, ...]) -> dict[str, int]:
    """Return the FLOPs of 1 image of ``input_size`` [C, H, W] by module name; ``""`` is the model."""
    parameter = next(model.parameters())
    image = torch.zeros((1, *input_size), dtype=parameter.dtype, device=parameter.device)
    return count_flops(model, (image,))


def count_flops(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, int]:
    with warnings.catch_warnings():
        # fvcore stands on torch.jit.trace, which torch has deprecated; there is no release without it.
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis
        from fvcore.nn.jit_handles import bmm_flop_jit, elementwise_flop_counter

        analysis = FlopCountAnalysis(model, inputs)
        analysis.set_op_handle("aten::scaled_dot_product_attention", _count_sdpa)
        analysis.set_op_handle("aten::einsum", _count_einsum)
        analysis.set_op_handle("aten::baddbmm", lambda inputs, outputs: bmm_flop_jit(inputs[1:3], outputs))
        analysis.set_op_handle("aten::_convolution_mode", _count_padded_convolution)
        for name, (per_input, per_output) in _PER_ELEMENT.items():
            analysis.set_op_handle(name, elementwise_flop_counter(per_input, per_output))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        with torch.no_grad():
            counted = {name: int(count) for name, count in analysis.by_module().items()}
        uncounted = sorted(set(analysis.unsupported_ops()) - _NEGLIGIBLE)
    if uncounted:
        raise UnsupportedModelError(
            f"FLOPs of {type(model).__name__} cannot be counted: fvcore does not know {', '.join(uncounted)}"
        )
    return counted


def weightless(model: nn.Module) -> nn.Module:
    """Copy ``model`` to the CPU with tensors that take no memory. ``model`` may be on the meta device."""
    # Tracing on the meta device fails in shape checks of torch.
    stand_in = copy.deepcopy(model)
    take_weights(stand_in)
    return stand_in.eval()


def take_weights(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # A single zero, expanded to the shape: outputs are meaningless, FLOPs are right.
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            module.register_parameter(name, nn.Parameter(zeros, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            zeros = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
            module.register_buffer(name, zeros, persistent=name not in module._non_persistent_buffers_set)


def _count_sdpa(inputs: list[Any], outputs: list[Any]) -> int:
    query, key, value = (tuple(tensor.type().sizes()) for tensor in inputs[:3])
    rows = 1  # batch, heads and queries: every dimension but the channels
    for size in query[:-1]:
        rows *= size
    return int(rows * key[-2] * (query[-1] + value[-1]))


def _count_padded_convolution(inputs: list[Any], outputs: list[Any]) -> int:
    output = outputs[0].type().sizes()  # (B, C, height, width)
    return int(math.prod(inputs[1].type().sizes()) * output[0] * math.prod(output[2:]))


def _count_einsum(inputs: list[Any], outputs: list[Any]) -> int:
    # fvcore itself counts einsum to 4 digits only.
    equation = inputs[0].toIValue().replace(" ", "")
    shapes = [tuple(tensor.type().sizes()) for tensor in inputs[1].node().inputs()]
    operands, arrow, result = equation.partition("->")
    if not arrow or len(shapes) != 2:
        raise UnsupportedModelError(
            f"FLOPs of einsum {equation!r} cannot be counted: expected two operands and '->'"
        )
    sizes: dict[str, int] = {}
    for term, shape in zip(operands.split(","), shapes, strict=True):
        front, _, back = term.partition("...")
        sizes.update(zip(front, shape, strict=False))
        sizes.update(zip(reversed(back), reversed(shape), strict=False))
    summed = math.prod(size for index, size in sizes.items() if index not in result)
    return int(math.prod(outputs[0].type().sizes()) * summed)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
