"""``mhacut bench``: what it measures, and what it says of it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import mhacut
from helpers.cli import document_of, run
from helpers.files import SLIM, cut_into_file, save_dense
from helpers.models import ModelCase, build
from helpers.plans import random_plan
from mhacut.checkpoint.load import open_checkpoint, read_model
from mhacut.commands import bench as benching
from mhacut.commands.bench import timing_of
from mhacut.errors import CheckpointError, MhacutError, UsageError
from mhacut.plan import Plan
from mhacut.surgery.find import find_prunable_layers
from properties.cases import CASES

QUICK = {"batch_sizes": (2,), "seconds": 0.01}


def test_ratios_are_of_the_same_round():
    # The machine became three times slower for both on the way.
    first, own = [1.0, 1.0, 3.0, 3.0, 3.0], [0.5, 0.5, 1.5, 1.5, 1.5]
    timing = timing_of(4, own, first, saved_flops=0.6, peak_mib=None)
    assert timing.ratio == pytest.approx(0.5)
    assert timing.saving_realised == pytest.approx(0.5 / 0.6)
    assert timing.median_ms == pytest.approx(1500)
    assert timing.runs == 5
    assert timing_of(4, first, first, saved_flops=0, peak_mib=None).saving_realised is None


def test_a_dense_model_is_timed_on_images_of_the_size_that_a_slim_one_was_cut_for(tmp_path):
    case = CASES["attention2d.MultiQueryAttention2d, model"]
    model = build(case)
    dense = save_dense(model, tmp_path / "dense.safetensors")
    plan, _ = random_plan(find_prunable_layers(model), seed=0)
    slim = cut_into_file(model, plan, tmp_path / "slim.safetensors", case)
    (made,) = read_model(slim).record.history
    asked = {"model": case.architecture, "model_args": {"num_classes": 5}}
    before = torch.get_num_threads()
    first, second = mhacut.bench(dense, slim, **QUICK, threads=1, **asked).models
    assert (first.flops, second.flops) == (made["flops_before"], made["flops_after"])
    assert first.file_bytes == dense.stat().st_size
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_padded_attention_of_large_images_counts_in_what_runs(tmp_path):
    """Of 3 heads of 24 channels in all: q and k keep 4 of 8 channels, v all of them."""
    side = 576
    case = ModelCase("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 24, "num_heads": 3, "img_size": side})
    model = build(case)
    dense = save_dense(model, tmp_path / "dense.safetensors")
    units = find_prunable_layers(model).units()
    plan = Plan(tuple(unit.keep_first(4 if unit.kind == "qk" else unit.width) for unit in units))
    slim = cut_into_file(model, plan, tmp_path / "slim.safetensors", case)
    asked = {"model": case.architecture, "model_args": {"num_heads": 3, "num_classes": 5}}
    first, second = mhacut.bench(dense, slim, batch_sizes=(1,), seconds=0.01, **asked).models

    def products(written: int, multiplied: int) -> int:
        patches = (side // 16) ** 2
        n = patches + 1
        linear = patches * 768 * 24 + n * 24 * (3 * (2 * written + 8) + 24 + 2 * 96) + 24 * 5
        return linear + 3 * n * n * (multiplied + 8)

    assert first.timings[0].executed == 1
    expected = products(4, 8) / products(8, 8)
    assert second.timings[0].executed == pytest.approx(expected, rel=1e-6)


def test_a_part_is_that_of_dense_checkpoints(slim_of, tmp_path):
    case = SLIM["vit"]
    small, large = case.create(), ModelCase(case.architecture, {**case.args, "depth": 4}).create()
    training = tmp_path / "training.pth"
    torch.save({"student": small.state_dict(), "teacher": large.state_dict()}, training)
    asked = {"model": case.architecture, "model_args": {"num_heads": 3}, **QUICK}
    first, second = mhacut.bench(training, slim_of("vit"), part="teacher", **asked).models
    assert first.parameters == sum(parameter.numel() for parameter in large.parameters())
    assert second.parameters < first.parameters
    (student,) = mhacut.bench(training, part="student", **asked).models
    assert student.parameters == sum(parameter.numel() for parameter in small.parameters())
    with pytest.raises(CheckpointError, match="found 2 networks"):
        mhacut.bench(training, part="pupil", **asked)


def test_shards_count_as_one_file(tmp_path):
    model = SLIM["vit"].create()
    state = model.state_dict()
    config = {"architecture": SLIM["vit"].architecture, "model_args": SLIM["vit"].args}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = []
    for number, names in enumerate((list(state)[:5], list(state)[5:]), 1):
        path = tmp_path / f"model-{number:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in names}, path)
        sizes.append(path.stat().st_size)
    header = open_checkpoint(tmp_path)
    assert benching._file_bytes(header) == sum(sizes)


@pytest.mark.slow
def test_int8_stands_beside_float32(slim_of):
    result = mhacut.bench(slim_of("vit"), **QUICK, runtime="onnx", int8=True)
    assert (result.runtime, result.device) == ("onnx", "cpu")
    exact, quantized = result.models
    assert (exact.int8, quantized.int8) == (False, True)
    assert (exact.source, exact.flops) == (quantized.source, quantized.flops)
    assert quantized.file_bytes < exact.file_bytes
    assert quantized.timings[0].saving_realised is None
    assert quantized.timings[0].ratio > 0


@pytest.mark.slow
def test_the_command(slim_of):
    flags = ["--batch-sizes", "1,3", "--seconds", "0.01", "--dtype", "bfloat16"]
    document = document_of("bench", slim_of("vit"), slim_of("vit"), *flags)
    assert [timing["batch_size"] for timing in document["models"][1]["timings"]] == [1, 3]
    assert document["dtype"] == "bfloat16"
    shown = run("bench", slim_of("vit"), *flags, "--batch-sizes", "3")
    assert "[1]      3" in shown.stdout


@pytest.mark.slow
def test_what_cannot_be_compiled_is_one_sentence(slim_of, compiles_by):
    def fail(graph, inputs):
        raise RuntimeError("no compiler")

    compiles_by(fail)
    said = r"^runtime='compile': torch.compile fails \(backend='fail' raised: Runtime"
    with pytest.raises(MhacutError, match=said):
        mhacut.bench(slim_of("vit"), **QUICK, runtime="compile")


@pytest.mark.slow
def test_all_of_many_models_are_compiled(compiles_by, tmp_path):
    """torch itself keeps eight programs of one class, and runs the ninth model eagerly."""
    compiled, files = [], []
    args = {"depth": 1, "num_heads": 1, "img_size": 32}
    for width in range(8, 80, 8):
        case = ModelCase("vit_tiny_patch16_224", {**args, "embed_dim": width})
        files.append(save_dense(case.create(), tmp_path / f"{width}.safetensors"))

    def compiler(graph, inputs):
        compiled.append(graph)
        return graph.forward

    compiles_by(compiler)
    mhacut.bench(*files, **QUICK, model="vit_tiny_patch16_224", model_args=args, runtime="compile")
    assert len(compiled) == 9


@pytest.mark.parametrize(
    "options",
    [
        {"batch_sizes": ()},
        {"batch_sizes": (0,)},
        {"seconds": 0.0},
        {"runtime": "jit"},
        {"dtype": "int8"},
        {"int8": True},
        {"runtime": "openvino", "int8": True},
        {"runtime": "openvino", "dtype": "bfloat16"},
    ],
)
def test_refused_before_any_work(options):
    with pytest.raises(UsageError, match="expected"):
        mhacut.bench("no such file", **options)
