"""OpenVINO: an IR that gives the model's numbers, and its speed beside others'."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from torch import nn

import mhacut
from helpers.cli import run
from mhacut.checkpoint.load import load_model
from mhacut.errors import MhacutError, OutputError, UsageError
from mhacut.exporting.runtimes import onnx_program, openvino_program, openvino_runner, part_content

installed = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino, an extra, is not installed"
)


@installed
def test_the_ir_gives_the_model_s_numbers_at_any_batch(slim_of, tmp_path):
    import openvino

    result = mhacut.export(slim_of("vit"), format="openvino", output=tmp_path / "model.xml")
    assert set(result.difference) == {1, 2, 5}
    assert max(result.difference.values()) < 1e-5
    assert {file.name for file in tmp_path.iterdir()} == {"model.xml", "model.bin"}
    assert result.file_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    read = openvino.Core().read_model(tmp_path / "model.xml")
    about = json.loads(read.get_rt_info("mhacut").value)
    assert about["architecture"] == result.architecture
    assert about["preprocessing"]["input_size"] == [3, 32, 32]
    images = torch.randn(3, 3, 32, 32)
    compiled = openvino.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    logits = torch.from_numpy(compiled({"images": images.numpy()})["logits"])
    expected = mhacut.load_model(slim_of("vit"))(images).detach()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@installed
def test_half_precision_halves_the_weights(slim_of, tmp_path):
    exact = mhacut.export(slim_of("vit"), format="openvino", output=tmp_path / "a.xml")
    half = mhacut.export(slim_of("vit"), format="openvino", dtype="float16", output=tmp_path / "b.xml")
    weights = [(tmp_path / name).stat().st_size for name in ("a.bin", "b.bin")]
    assert weights[1] < 0.6 * weights[0]
    assert max(exact.difference.values()) < max(half.difference.values()) < 1e-2


@installed
def test_a_full_disk_is_told(slim_of, tmp_path):
    resource = pytest.importorskip("resource")
    slim, target = slim_of("vit"), tmp_path / "model.xml"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(MhacutError, match=r"model\.xml: OpenVINO cannot write to .*; is the disk full\?"):
            mhacut.export(slim, format="openvino", output=target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@installed
def test_what_openvino_cannot_convert_is_named():
    import onnx

    model = onnx.load_from_string(part_content(torch.nn.Linear(3, 2).eval(), (torch.zeros(1, 3),)))
    model.graph.node[-1].op_type = "Frobnicate"
    with pytest.raises(MhacutError, match=r"OpenVINO cannot convert the model: .*Frobnicate"):
        openvino_program(model.SerializeToString(), (torch.zeros(1, 3),), 1)


@installed
def test_it_is_timed(slim_of):
    result = mhacut.bench(slim_of("vit"), runtime="openvino", threads=1, batch_sizes=(2,), seconds=0.01)
    assert (result.runtime, result.device) == ("openvino", "cpu")
    assert result.models[0].timings[0].median_ms > 0


@installed
def test_it_is_compiled_for_the_batch(slim_of, monkeypatch):
    import openvino

    compiled, compile_model = [], openvino.compile_model

    def recording(model, *settings):
        compiled.append(model.input(0).shape[0])
        return compile_model(model, *settings)

    monkeypatch.setattr(openvino, "compile_model", recording)
    model = load_model(slim_of("vit"))
    runner = openvino_runner(model, (3, 32, 32), threads=1)
    for count in (2, 1, 1):
        images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
        assert torch.allclose(runner(images), model(images), atol=1e-5)
    assert compiled == [2, 1]


@installed
def test_the_command(slim_of, tmp_path):
    file = tmp_path / "model.xml"
    result = run("export", slim_of("vit"), "--format", "openvino", "-o", file)
    assert result.exit_code == 0, result.stderr
    assert f"saved {file}, " in result.stdout
    assert "unless compile_model is given {'INFERENCE_PRECISION_HINT': 'f32'}" in result.stdout


@installed
def test_neither_file_is_replaced(slim_of, tmp_path):
    (tmp_path / "model.bin").write_text("mine")
    with pytest.raises(OutputError, match=r"model.bin: exists already"):
        mhacut.export(slim_of("vit"), format="openvino", output=tmp_path / "model.xml")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        (mhacut.export, {"format": "openvino", "dtype": "bfloat16"}, "expected float32 or float16"),
        (mhacut.export, {"format": "openvino", "output": "model.onnx"}, "format='onnx'"),
        (mhacut.export, {"format": "openvino", "output": "model"}, "a name that ends in .xml"),
        (mhacut.export, {"format": "openvino", "int8": True}, "int8=True: expected format='onnx'"),
        (mhacut.bench, {"runtime": "openvino", "dtype": "bfloat16"}, "float32 with runtime='openvino'"),
        (mhacut.bench, {"runtime": "openvino", "int8": True}, "int8=True: expected runtime='onnx'"),
        (mhacut.bench, {"int8": True}, "int8=True: expected runtime='onnx'"),
    ],
)
def test_refused_before_any_work(command, options, expected):
    with pytest.raises(UsageError, match=expected):
        command("no such file", **options)


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
