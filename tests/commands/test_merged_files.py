"""Slim files of models that merge tokens: written, opened, pruned again, fine-tuned, timed and exported."""

from __future__ import annotations

import pytest

import mhacut
from helpers.cli import FAST, succeed
from helpers.data import write_split
from helpers.files import save_dense
from helpers.models import ModelCase, build, slow_but
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.tokens import tokens_of

ARGS = {"depth": 3, "embed_dim": 48, "num_heads": 3, "img_size": 64}
VIT = ModelCase("vit_tiny_patch16_224", ARGS)


@pytest.fixture(scope="module")
def merged_file(tmp_path_factory):
    output = tmp_path_factory.mktemp("merged") / "slim.safetensors"
    # With scope="auto", merges of so small a model do not pay.
    options = {"model_args": ARGS, "calibration_images": 12, "round_to": 4, "latency": False}
    scope = "attention+mlp+tokens"
    return mhacut.prune(build(VIT), flops="50%", output=output, scope=scope, **options).output


@pytest.mark.parametrize("format", slow_but({"pt2"}, ["pt2", "onnx"]))
def test_a_file_can_be_exported(merged_file, tmp_path, format):
    found = mhacut.export(merged_file, format=format, output=tmp_path / "exported")
    assert max(found.difference.values()) < 1e-4


@pytest.mark.slow
def test_a_file_is_fine_tuned_timed_and_described(merged_file, tmp_path):
    """The teacher merges nothing."""
    teacher = save_dense(build(VIT), tmp_path / "dense.safetensors")
    for split in ("train", "val"):
        write_split(tmp_path / "data" / split, classes=tuple("abcde"))
    training = {"epochs": 2, "batch_size": 5, "workers": 0, "grad_checkpointing": True}
    given = {"teacher": teacher, "data_dir": tmp_path / "data", "output": tmp_path / "run"}
    run = mhacut.finetune(merged_file, **given, **training)
    assert run.epochs[-1].train_loss < run.epochs[0].train_loss
    tuned = mhacut.load_model(run.output)
    assert tokens_of(tuned) == tokens_of(mhacut.load_model(merged_file))
    timed = mhacut.bench(merged_file, run.output, batch_sizes=(1,), threads=1, seconds=0.1)
    described = mhacut.inspect(run.output)
    counted = measure_flops(tuned, (3, 64, 64))
    assert counted == run.flops == described.inspection.flops
    assert {model.flops for model in timed.models} == {counted}


@pytest.mark.slow
def test_what_is_said_of_a_file_states_its_merges(merged_file, tmp_path):
    """In the terminal, on the page of ``inspect`` and on that of ``prune``."""
    tokens = tokens_of(mhacut.load_model(merged_file))
    assert any(tokens.merged)
    stated = f"tokens merged per block: {', '.join(map(str, tokens.merged))}"
    inspected = succeed("inspect", merged_file, "--html", tmp_path / "inspect.html")
    assert stated in " ".join(inspected.stdout.split())
    given = ["--flops", "90%", "--scope", "attention+mlp", *FAST, "-o", tmp_path / "again.safetensors"]
    succeed("prune", merged_file, *given, "--report", tmp_path / "prune.html")
    for name in ("inspect.html", "prune.html"):
        assert stated in (tmp_path / name).read_text()
