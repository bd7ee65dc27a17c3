"""OpenVINO: an IR that gives the model's numbers, and its speed beside others'."""

from __future__ import annotations

import json

import pytest
import torch

import mhacut
from mhacut.checkpoint.load import load_model
from mhacut.errors import MhacutError, OutputError
from mhacut.exporting.runtimes import openvino_program, openvino_runner, part_content

openvino = pytest.importorskip("openvino", reason="an extra")


def test_the_ir_gives_the_model_s_numbers_at_any_batch(slim_of, tmp_path):
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


def test_half_precision_halves_the_weights(slim_of, tmp_path):
    exact = mhacut.export(slim_of("vit"), format="openvino", output=tmp_path / "a.xml")
    half = mhacut.export(slim_of("vit"), format="openvino", dtype="float16", output=tmp_path / "b.xml")
    weights = [(tmp_path / name).stat().st_size for name in ("a.bin", "b.bin")]
    assert weights[1] < 0.6 * weights[0]
    assert max(exact.difference.values()) < max(half.difference.values()) < 1e-2


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


def test_what_openvino_cannot_convert_is_named():
    import onnx

    model = onnx.load_from_string(part_content(torch.nn.Linear(3, 2).eval(), (torch.zeros(1, 3),)))
    model.graph.node[-1].op_type = "Frobnicate"
    with pytest.raises(MhacutError, match=r"OpenVINO cannot convert the model: .*Frobnicate"):
        openvino_program(model.SerializeToString(), (torch.zeros(1, 3),), 1)


def test_it_is_timed(slim_of):
    result = mhacut.bench(slim_of("vit"), runtime="openvino", threads=1, batch_sizes=(2,), seconds=0.01)
    assert (result.runtime, result.device) == ("openvino", "cpu")
    assert result.models[0].timings[0].median_ms > 0


def test_it_is_compiled_for_the_batch(slim_of, monkeypatch):
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


def test_neither_file_is_replaced(slim_of, tmp_path):
    (tmp_path / "model.bin").write_text("mine")
    with pytest.raises(OutputError, match=r"model.bin: exists already"):
        mhacut.export(slim_of("vit"), format="openvino", output=tmp_path / "model.xml")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]
