"""``mhacut export``: files that another runtime runs to the same numbers, with nothing of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import twins
from torch import nn

import mhacut
from helpers.cli import run, succeed
from helpers.models import build, image
from mhacut.checkpoint.load import read_model
from mhacut.commands import export as exporting
from mhacut.commands.export import ExportResult
from mhacut.errors import MhacutError, OutputError, UsageError
from mhacut.exporting import runtimes
from mhacut.exporting.runtimes import refusing
from mhacut.options.export import ExportOptions
from properties.cases import FIRST_MODEL


@pytest.fixture(scope="module")
def exported(slim_of, tmp_path_factory) -> Callable[[str], ExportResult]:
    def export(format: str) -> ExportResult:
        return mhacut.export(slim_of("vit"), format=format, output=tmp_path_factory.mktemp(format) / "file")

    return cache(export)


@pytest.mark.parametrize("format", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_the_file_gives_the_model_s_numbers_at_any_batch(format, exported):
    result = exported(format)
    assert set(result.difference) == {1, 2, 5}
    assert max(result.difference.values()) < 1e-5
    assert result.file_bytes == result.output.stat().st_size
    assert list(result.output.parent.iterdir()) == [result.output]


@pytest.mark.slow
def test_the_file_names_no_folder_of_this_machine(exported):
    """As traces of the code that each operation comes from do."""
    content = exported("onnx").output.read_bytes()
    assert os.path.dirname(timm.__file__).encode() not in content


ALONE = """
import sys
from collections.abc import Callable
from functools import cache
for name in ("mhacut", "timm"):
    sys.modules[name] = None  # importing it fails
import json, torch
from safetensors.torch import load_file, save_file
images = load_file(sys.argv[3])["x"]
extra = {"mhacut.json": ""}
logits = torch.export.load(sys.argv[1], extra_files=extra).module()(images).detach()
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[2])
onnx_logits = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
save_file({"pt2": logits, "onnx": onnx_logits}, sys.argv[4])
print(extra["mhacut.json"])
print(session.get_modelmeta().custom_metadata_map["mhacut"])
"""


@pytest.mark.slow
def test_the_files_need_nothing_of_ours(exported, slim_of, tmp_path):
    images, files = torch.randn(3, 3, 32, 32), [exported(format).output for format in ("pt2", "onnx")]
    save_file({"x": images}, tmp_path / "x.safetensors")
    command = [sys.executable, "-c", ALONE, *files, tmp_path / "x.safetensors", tmp_path / "y.safetensors"]
    result = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout
    expected = mhacut.load_model(slim_of("vit"))(images).detach()
    for logits in load_file(tmp_path / "y.safetensors").values():
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    for about in map(json.loads, result.splitlines()):
        assert about["architecture"] == "vit_tiny_patch16_224"
        assert about["preprocessing"]["input_size"] == [3, 32, 32]
        assert [entry["command"] for entry in about["history"]] == ["prune"]


@pytest.mark.slow
def test_half_precision_behind_float32_images(exported, slim_of, tmp_path):
    exact = exported("pt2")
    half = mhacut.export(slim_of("vit"), format="pt2", dtype="bfloat16", output=tmp_path / "half.pt2")
    assert half.file_bytes < exact.file_bytes
    assert 0 < half.difference[2] < 0.1
    program = torch.export.load(tmp_path / "half.pt2")
    assert {tensor.dtype for tensor in program.state_dict.values()} == {torch.bfloat16}
    assert program.module()(torch.randn(2, 3, 32, 32)).dtype == torch.float32


@pytest.mark.slow
def test_a_dense_file_can_be_exported(tiny_vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = mhacut.export(tiny_vit.path, **tiny_vit.options, format="pt2")
    assert str(result.output) == "tiny.pt2"
    x = torch.randn(1, 3, 32, 32)
    dense = read_model(tiny_vit.path, **tiny_vit.options).model
    torch.testing.assert_close(torch.export.load("tiny.pt2").module()(x), dense(x), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_file_that_differs_is_not_kept(slim_of, tmp_path, monkeypatch):
    monkeypatch.setitem(exporting.TOLERANCE, "float32", -1.0)
    with pytest.raises(MhacutError, match=r"differs from the original by .* nothing was written"):
        mhacut.export(slim_of("vit"), format="pt2", output=tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bound", [1e-4, float("inf")])
def test_what_is_not_finite_is_not_kept(bound):
    options = ExportOptions(checkpoint="slim.safetensors", format="onnx")
    model, run = nn.Identity(), lambda images: images * float("nan")
    with pytest.raises(MhacutError, match=r"by nan of the largest output at batch size 1 and image size "):
        exporting._differences(model, run, ((3, 2, 2),), options, bound)


def test_what_is_there_is_not_replaced(slim_of, tmp_path):
    file = tmp_path / "model.pt2"
    file.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        mhacut.export(slim_of("vit"), format="pt2", output=file)
    assert file.read_text() == "mine"
    with pytest.raises(OutputError, match="is the input"):
        mhacut.export(slim_of("vit"), format="pt2", output=slim_of("vit"), overwrite=True)


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_runtimes_are_extras(runtime, slim_of, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    wanted = rf"='{runtime}' needs onnx, .*pip install 'mhacut\[{runtime}\]'"
    with pytest.raises(MhacutError, match="format" + wanted):
        mhacut.export(slim_of("vit"), format=runtime)
    with pytest.raises(MhacutError, match="runtime" + wanted):
        mhacut.bench(slim_of("vit"), runtime=runtime)


def test_what_a_translator_cannot_do_is_refused_in_one_line():
    said = r"^format='onnx': fails: ValueError: the reason; try pt2$"
    with pytest.raises(MhacutError, match=said), refusing("format='onnx': fails", "try pt2"):
        raise RuntimeError("advice to developers") from ValueError("the reason\nand more")
    with pytest.raises(MemoryError), refusing("format='onnx'", "try pt2"):
        raise RuntimeError("advice to developers") from MemoryError("no space left")
    with pytest.raises(MhacutError, match=r"cannot be run as ONNX: .*; PyTorch may run it"):
        runtimes.onnx_runner(b"no model")


@pytest.mark.exhaustive
def test_an_opset_that_nobody_here_knows_is_refused(slim_of, tmp_path):
    with pytest.raises(MhacutError, match=r"opset=999: onnxscript or ONNX Runtime fails: .*; try opset=18"):
        mhacut.export(slim_of("vit"), opset=999, output=tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive
def test_attention_of_five_dimensions_is_exported():
    """Twins' has five dimensions, which torch does not translate as one operator."""
    case = FIRST_MODEL[twins.LocallyGroupedAttn]
    options = ExportOptions(checkpoint="model", opset=23)
    _, program = runtimes.RUNTIMES["onnx"](build(case).requires_grad_(False), case.size, "{}", options)
    assert program(image(case, batch=3)).isfinite().all()


CARD = "expected format='timm', the only format with a model card"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onnx", "dtype": "bfloat16"}, "expected"),
        ({"format": "jit"}, "expected"),
        ({"fixed_batch": 0}, "expected"),
        ({"opset": 9}, "expected"),
        ({"output": "model.pt2"}, "expected"),
        ({"output": "model.ONNX", "format": "pt2"}, "expected"),
        ({"format": "openvino", "dtype": "bfloat16"}, "expected float32 or float16"),
        ({"format": "openvino", "output": "model.onnx"}, "format='onnx'"),
        ({"format": "openvino", "output": "model"}, "a name that ends in .xml"),
        ({"format": "openvino", "int8": True}, "int8=True: expected format='onnx'"),
        ({"format": "pt2", "int8": True}, "int8=True: expected format='onnx'"),
        ({"int8": True, "dtype": "float16"}, "dtype='float16': expected float32 with int8=True"),
        ({"int8": True, "calibration_images": 1}, "expected at least 8"),
        ({"data_dir": "images"}, "expected int8=True"),
        ({"push_to_hub": "some/vit"}, CARD),
        ({"push_to_hub": "vit", "format": "timm"}, "push_to_hub='vit': expected OWNER/NAME"),
        ({"push_to_hub": "../../vit", "format": "timm"}, "expected OWNER/NAME"),
        ({"license": "mit"}, f"license='mit': {CARD}"),
        ({"license": "MIT License", "format": "timm"}, "license='MIT License': expected a name such as"),
    ],
)
def test_refused_before_any_work(options, message):
    with pytest.raises(UsageError, match=message):
        mhacut.export("no such file", **options)


@pytest.mark.slow
def test_the_command(slim_of, tmp_path):
    file = tmp_path / "model.pt2"
    result = succeed("export", slim_of("vit"), "--format", "pt2", "-o", file, "--json", "--opset", "23")
    assert "--opset has no effect without --format onnx" in result.stderr
    document = json.loads(result.stdout)
    assert (document["command"], document["output"], document["format"]) == ("export", str(file), "pt2")
    assert document["difference"].keys() == {"1", "2", "5"}
    text = run("export", slim_of("vit"), "--format", "pt2", "-o", file, "--overwrite")
    assert f"saved {file}, " in text.stdout
    assert "any batch of 3x32x32, float32" in text.stdout


class Difference(nn.Module):
    """Its second input decides nothing."""

    def forward(self, *given):
        return given[0] - given[2]


INPUTS = tuple(torch.full((2, 3), float(number)) for number in (5, 7, 1))


@pytest.mark.slow
def test_inputs_of_another_order_are_paired_by_name():
    onnx = pytest.importorskip("onnx")
    program = onnx.load_from_string(runtimes.part_content(Difference().eval(), INPUTS))
    turned = list(program.graph.input)[::-1]
    del program.graph.input[:]
    program.graph.input.extend(turned)
    (found,) = runtimes.onnx_program(program.SerializeToString(), INPUTS, 1)()
    assert torch.equal(torch.from_numpy(found), torch.full((2, 3), 4.0))


def test_what_openvino_leaves_out_moves_no_other_input():
    pytest.importorskip("openvino", reason="an extra")
    run = runtimes.openvino_program(runtimes.part_content(Difference().eval(), INPUTS), INPUTS, 1)
    assert torch.equal(torch.from_numpy(run()[0]), torch.full((2, 3), 4.0))
