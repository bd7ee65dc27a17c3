"""Parts of models as programs of ONNX Runtime and OpenVINO: each input goes where its name says."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from mhacut.errors import MhacutError
from mhacut.exporting.openvino_ir import openvino_program
from mhacut.exporting.runtimes import onnx_program, part_content

installed = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino, an extra, is not installed"
)


class Difference(nn.Module):
    """Its second input decides nothing."""

    def forward(self, *given):
        return given[0] - given[2]


@pytest.fixture
def inputs():
    return tuple(torch.full((2, 3), float(number)) for number in (5, 7, 1))


@pytest.mark.slow
def test_inputs_of_another_order_are_paired_by_name(inputs):
    import onnx

    program = onnx.load_from_string(part_content(Difference().eval(), inputs))
    turned = list(program.graph.input)[::-1]
    del program.graph.input[:]
    program.graph.input.extend(turned)
    (found,) = onnx_program(program.SerializeToString(), inputs, 1)()
    assert torch.equal(torch.from_numpy(found), torch.full((2, 3), 4.0))


@installed
def test_what_openvino_leaves_out_moves_no_other_input(inputs):
    run = openvino_program(part_content(Difference().eval(), inputs), inputs, 1)
    assert torch.equal(torch.from_numpy(run()[0]), torch.full((2, 3), 4.0))


def test_an_input_that_nobody_gives_is_named(inputs):
    content = part_content(Difference().eval(), inputs)
    message = r"unexpected input, 'input_2'; expected only input_0, input_1; measure in another runtime"
    with pytest.raises(MhacutError, match=message):
        onnx_program(content, inputs[:2], 1)
