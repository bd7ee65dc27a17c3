"""``mhacut export``: files that another runtime runs to the same numbers, with nothing of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import twins, vision_transformer
from torch import nn

import mhacut
from helpers.cli import run
from helpers.files import SLIM
from helpers.models import build, image, slow_but
from mhacut.checkpoint.load import read_model
from mhacut.commands import export as exporting
from mhacut.commands.export import ExportResult
from mhacut.errors import MhacutError, OutputError, UsageError
from mhacut.exporting import programs, runtimes
from mhacut.exporting.quantize import quantize
from mhacut.options.export import ExportOptions
from mhacut.runtime.progress import Silent
from properties.cases import FIRST_MODEL


@pytest.fixture(scope="module")
def exported(slim_of, tmp_path_factory) -> Callable[[str, str], ExportResult]:
    """One of SLIM in a format, made when first asked for; nothing else lies beside it."""

    def export(name: str, format: str) -> ExportResult:
        output = tmp_path_factory.mktemp(name) / "file"
        return mhacut.export(slim_of(name), format=format, output=output)

    return cache(export)


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("pt2", "vit"),
        pytest.param("pt2", "distilled", marks=pytest.mark.slow),
        *(
            pytest.param("onnx", name, marks=pytest.mark.exhaustive if name == "swin" else pytest.mark.slow)
            for name in SLIM
            if name != "coat"
        ),
    ],
)
def test_the_file_gives_the_model_s_numbers_at_any_batch(format, name, exported):
    result = exported(name, format)
    assert set(result.difference) == {1, 2, 5}
    assert max(result.difference.values()) < 1e-5
    assert result.file_bytes == result.output.stat().st_size
    assert list(result.output.parent.iterdir()) == [result.output]


@pytest.mark.parametrize("format", slow_but({"pt2"}, ["pt2", "onnx"]))
def test_the_file_names_no_folder_of_this_machine(format, exported):
    """As traces of the code that each operation comes from do."""
    content = exported("vit", format).output.read_bytes()
    assert os.path.dirname(timm.__file__).encode() not in content


class Autocast(torch.nn.Module):
    """What runs under autocast becomes a graph within the graph."""

    def __init__(self):
        super().__init__()
        self.classifier = torch.nn.Linear(3, 2)

    def forward(self, images):
        with torch.autocast("cpu", enabled=False):
            return self.classifier(images.mean((2, 3)))


def test_graphs_within_a_graph_name_no_folder_either():
    options = ExportOptions(checkpoint="none", format="pt2")
    content, *_ = runtimes.RUNTIMES["pt2"](Autocast().eval(), (3, 8, 8), "{}", options)
    assert os.path.dirname(__file__).encode() not in content


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
    images, files = torch.randn(3, 3, 32, 32), [exported("vit", format).output for format in ("pt2", "onnx")]
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
    exact = exported("vit", "pt2")
    half = mhacut.export(slim_of("vit"), format="pt2", dtype="bfloat16", output=tmp_path / "half.pt2")
    assert half.file_bytes < exact.file_bytes
    assert 0 < half.difference[2] < 0.1
    program = torch.export.load(tmp_path / "half.pt2")
    assert {tensor.dtype for tensor in program.state_dict.values()} == {torch.bfloat16}
    assert program.module()(torch.randn(2, 3, 32, 32)).dtype == torch.float32


def test_weights_of_half_precision_that_become_wider_are_said_so(tiny_vit, tmp_path):
    path = tmp_path / "half.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(tiny_vit.path).items()}, path)
    reporter = Silent()
    lines: list[str] = []
    reporter.log = lines.append
    model = {"model": tiny_vit.architecture, "model_args": tiny_vit.args, "reporter": reporter}
    mhacut.export(path, format="timm", output=tmp_path / "wide", **model)
    assert (
        "weights are float16 in the file; timm is written in float32, which every runtime supports; "
        "dtype='float16' keeps float16"
    ) in lines
    lines.clear()
    mhacut.export(path, format="timm", dtype="float16", output=tmp_path / "half", **model)
    assert not [line for line in lines if "is written in" in line]


def test_a_fixed_batch(slim_of, tmp_path):
    result = mhacut.export(slim_of("vit"), format="pt2", fixed_batch=1, output=tmp_path / "one.pt2")
    assert set(result.difference) == {1}
    program = torch.export.load(tmp_path / "one.pt2").module()
    assert program(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    with pytest.raises((AssertionError, RuntimeError), match=r"Guard failed|to be equal to 1"):
        program(torch.randn(2, 3, 32, 32))


def test_a_dense_file_can_be_exported(tiny_vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = mhacut.export(tiny_vit.path, model=tiny_vit.architecture, model_args=tiny_vit.args, format="pt2")
    assert str(result.output) == "tiny.pt2"
    x = torch.randn(1, 3, 32, 32)
    dense = read_model(tiny_vit.path, model=tiny_vit.architecture, model_args=tiny_vit.args).model
    torch.testing.assert_close(torch.export.load("tiny.pt2").module()(x), dense(x), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_file_that_differs_is_not_kept(slim_of, tmp_path, monkeypatch):
    monkeypatch.setitem(exporting.TOLERANCE, "float32", -1.0)
    with pytest.raises(MhacutError, match=r"differs from the original by .* no file was kept"):
        mhacut.export(slim_of("vit"), format="pt2", output=tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bounded", [True, False])
def test_what_is_not_finite_differs_by_no_number(bounded):
    options = ExportOptions(checkpoint="slim.safetensors", format="onnx")
    model, run = nn.Identity(), lambda images: images * float("nan")
    with pytest.raises(MhacutError, match=r"not finite at batch size 1; no file was kept$"):
        exporting._differences(model, run, (3, 2, 2), options, bounded=bounded)


def test_what_is_there_is_not_replaced(slim_of, tmp_path):
    file = tmp_path / "model.pt2"
    file.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        mhacut.export(slim_of("vit"), format="pt2", output=file)
    assert file.read_text() == "mine"
    with pytest.raises(OutputError, match="is the input"):
        mhacut.export(slim_of("vit"), format="pt2", output=slim_of("vit"), overwrite=True)


def test_onnx_is_an_extra(slim_of, monkeypatch):
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MhacutError, match=r"onnxruntime.*pip install 'mhacut\[onnx\]'"):
        mhacut.export(slim_of("vit"), format="onnx")


def test_what_torch_export_cannot_trace_is_refused_in_one_line(slim_of, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no such operator\nwith advice to developers")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(
        MhacutError, match=r"^format='pt2': torch.export fails \(RuntimeError: no such operator\)$"
    ):
        mhacut.export(slim_of("vit"), format="pt2", output=tmp_path / "file.pt2")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_translated_is_refused_in_one_line(slim_of, tmp_path, monkeypatch):
    def wrapped(*_, **__):
        try:
            raise ValueError("the reason\nand more")
        except ValueError as error:
            raise RuntimeError("advice to developers") from error

    monkeypatch.setattr(runtimes, "_exported", wrapped)
    with pytest.raises(MhacutError) as found:
        mhacut.export(slim_of("vit"), output=tmp_path / "model.onnx")
    reason = "onnxscript or ONNX Runtime fails (ValueError: the reason)"
    assert str(found.value) == f"format='onnx': {reason}; try format='pt2'"


@pytest.mark.parametrize(
    ("cause", "error"),
    [(MemoryError("no space left"), MemoryError), (OSError(28, "no space left"), OutputError)],
)
def test_what_no_opset_is_to_blame_for_is_not_put_on_it(cause, error, slim_of, tmp_path, monkeypatch):
    def wrapped(*_, **__):
        raise RuntimeError("advice to developers") from cause

    monkeypatch.setattr(runtimes, "_exported", wrapped)
    with pytest.raises(error, match="no space left"):
        mhacut.export(slim_of("vit"), opset=20, output=tmp_path / "model.onnx")


def test_a_reason_without_text_is_one_of_the_reasons_around_it(monkeypatch):
    def wrapped(*_, **__):
        raise RuntimeError("outer") from AssertionError()

    monkeypatch.setattr(runtimes, "_exported", wrapped)
    with pytest.raises(MhacutError, match=r"fails \(RuntimeError: outer\); PyTorch may run it"):
        runtimes.onnx_content(torch.nn.Identity(), (3, 8, 8))


def test_what_cannot_be_run_as_onnx_is_refused_wherever_it_is_to_run(monkeypatch):
    with pytest.raises(MhacutError, match=r"cannot be run as ONNX: .*; PyTorch may run it"):
        runtimes.onnx_file_runner(b"no model")
    with pytest.raises(MhacutError, match="cannot be run as ONNX"):
        runtimes.onnx_program(b"no model", (torch.ones(1),), 1)

    def fail(*_, **__):
        raise AssertionError

    monkeypatch.setattr(runtimes, "_exported", fail)
    for content in (runtimes.onnx_content, runtimes.part_content):
        with pytest.raises(MhacutError, match=r"cannot be run as ONNX: .*fails \(AssertionError\)"):
            content(torch.nn.Identity(), (1, 1, 1))


def test_what_fails_only_when_it_runs_is_refused_too(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("bad allocation")

    session = SimpleNamespace(run=fail, get_inputs=list)
    monkeypatch.setattr(runtimes, "_session", lambda *_: session)
    reason = r".*\(RuntimeError: bad allocation\)"
    images = torch.zeros(1, 3, 8, 8)
    for program in (lambda: runtimes.onnx_file_runner(b"")(images), runtimes.onnx_program(b"", (), 1)):
        with pytest.raises(MhacutError, match="cannot be run as ONNX: " + reason):
            program()
    monkeypatch.setattr(runtimes, "_onnx_content", lambda *_: b"")
    options = ExportOptions(checkpoint="model", opset=20)
    _, export = runtimes.RUNTIMES["onnx"](torch.nn.Identity(), (3, 8, 8), "{}", options)
    with pytest.raises(MhacutError, match="opset=20: " + reason):
        export(images)


def test_what_cannot_be_quantized_is_refused_in_one_line(monkeypatch):
    """A model, and a layer alone: one that has nothing to quantize is timed in float32, as in the model."""
    onnx = pytest.importorskip("onnx")

    def fail(*_, **__):
        raise onnx.checker.ValidationError("the reason")

    content = runtimes.part_content(torch.nn.Linear(4, 4).eval(), (torch.zeros(2, 4),))
    monkeypatch.setattr("onnxruntime.quantization.shape_inference.quant_pre_process", fail)
    with pytest.raises(MhacutError, match=r"int8=True: .*\(ValidationError: the reason\); without it"):
        quantize(content, "dynamic")
    conditions = programs.Conditions("onnx", torch.device("cpu"), threads=1)
    with pytest.raises(MhacutError, match=r"int8=True: .*; without it"):
        programs.part_run(torch.nn.Linear(4, 4).eval(), (torch.zeros(2, 4),), conditions, int8=True)
    monkeypatch.setattr(programs, "onnx_content", lambda *_: b"no model")
    with pytest.raises(MhacutError, match=r"int8=True: .*; without it"):
        programs.int8_program(torch.nn.Identity(), (3, 8, 8), threads=1)


def test_sources_that_cannot_be_read_are_no_full_disk(monkeypatch):
    def wrapped(*_, **__):
        raise RuntimeError("advice") from OSError("could not get source code")

    monkeypatch.setattr(runtimes, "_exported", wrapped)
    with pytest.raises(MhacutError, match=r"\(OSError: could not get source code\)"):
        runtimes.onnx_content(torch.nn.Identity(), (3, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "opset", "expected"),
    [
        (vision_transformer.Attention, 22, 0),
        (vision_transformer.Attention, 23, 2),
        (twins.LocallyGroupedAttn, 23, 0),
    ],
)
def test_attention_is_one_operator_from_opset_23_on(cls, opset, expected):
    """Twins' has five dimensions, which torch does not translate into it."""
    onnx = pytest.importorskip("onnx")
    case = FIRST_MODEL[cls]
    options = ExportOptions(checkpoint="model", opset=opset)
    content, program = runtimes.RUNTIMES["onnx"](build(case).requires_grad_(False), case.size, "{}", options)
    operators = [node.op_type for node in onnx.load_from_string(content).graph.node]
    assert operators.count("Attention") == expected
    assert program(image(case, batch=3)).isfinite().all()


@pytest.mark.parametrize(
    ("asked", "written", "says"),
    [
        (26, 18, r"opset=26: the installed onnxscript writes opset 18 instead; try a lower one, or opset=18"),
        (999, 999, r"opset=999: onnxscript or ONNX Runtime fails \(.*; try a lower one, or opset=18"),
    ],
)
def test_an_opset_that_nobody_here_knows_is_refused(asked, written, says, slim_of, tmp_path, monkeypatch):
    from onnx import helper

    of_model = [helper.make_opsetid("", written)]
    proto = helper.make_model(helper.make_graph([], "empty", [], []), opset_imports=of_model)
    graph = SimpleNamespace(all_nodes=list)
    model = SimpleNamespace(metadata_props={}, graph=graph, functions={})
    program = SimpleNamespace(model=model, model_proto=proto)
    monkeypatch.setattr(runtimes, "_exported", lambda *_, **__: program)
    with pytest.raises(MhacutError, match=says):
        mhacut.export(slim_of("vit"), opset=asked, output=tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        {"format": "onnx", "dtype": "bfloat16"},
        {"format": "jit"},
        {"fixed_batch": 0},
        {"opset": 9},
        {"output": "model.pt2"},
        {"output": "model.ONNX", "format": "pt2"},
    ],
)
def test_refused_before_any_work(options):
    with pytest.raises(UsageError, match="expected"):
        mhacut.export("no such file", **options)


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ({"opset": 23, "int8": True, "data_dir": "a", "calibration_images": 8}, []),
        ({"opset": 23, "format": "pt2"}, ["opset"]),
        ({"int8": True, "calibration_images": 8}, ["calibration_images"]),
    ],
)
def test_options_without_effect_are_found(options, idle):
    assert list(ExportOptions.from_flat(checkpoint="a", **options).idle()) == idle


def test_the_command(slim_of, tmp_path):
    file = tmp_path / "model.pt2"
    result = run("export", slim_of("vit"), "--format", "pt2", "-o", file, "--json", "--opset", "23")
    assert result.exit_code == 0, result.stderr
    assert "--opset has no effect: --format pt2 has none" in result.stderr
    document = json.loads(result.stdout)
    assert (document["command"], document["output"], document["format"]) == ("export", str(file), "pt2")
    assert document["difference"].keys() == {"1", "2", "5"}
    text = run("export", slim_of("vit"), "--format", "pt2", "-o", file, "--overwrite")
    assert f"saved {file}, " in text.stdout
    assert "any batch of 3x32x32, float32" in text.stdout
