"""Slim files whose last block computes only the tokens that the classifier reads."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import mhacut
from helpers.files import ModelFile, save_dense
from helpers.jobs import Recorder
from helpers.models import ModelCase, build, image, relative
from helpers.pruning import prune_quickly, stated_by
from mhacut.errors import CheckpointError, UnsupportedModelError
from mhacut.plan import TokenPlan
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.tokens import tokens_of

ARGS = {"depth": 3, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}
VIT = ModelCase("vit_tiny_patch16_224", ARGS)


def prune(path, output, **options):
    file, reporter = ModelFile(path, VIT.architecture, {"num_classes": 5, **ARGS}), Recorder()
    # Merges have files of their own, and tests.
    given = {"flops": "60%", "round_to": 4, "scope": "attention+mlp", "reporter": reporter, **options}
    result = prune_quickly(file, output, **given)
    return result, [line for line in reporter.messages if "token" in line]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(build(VIT), tmp_path_factory.mktemp("dense") / "dense.safetensors")


@pytest.fixture(scope="module")
def slim(dense):
    return prune(dense, dense.parent / "slim.safetensors")[0].output


def test_prune_leaves_them_out_and_says_so(dense, tmp_path):
    result, (line,) = prune(dense, tmp_path / "slim.safetensors")
    assert "only the token that the classifier reads; keep_dead_tokens=True computes all tokens" in line
    model, whole = mhacut.load_model(result.output), build(VIT)
    assert tokens_of(model) == result.plan.tokens == TokenPlan(output_tokens=1)
    assert result.dense.flops == measure_flops(whole, VIT.size)
    assert result.dense.parameters == sum(p.numel() for p in whole.parameters())
    assert result.slim.flops == measure_flops(model, VIT.size) <= result.budget < 0.6 * result.dense.flops + 1
    record = stated_by(result.output)
    assert (record["format_version"], record["tokens"]) == (2, {"read": 1})


@pytest.mark.slow
def test_a_classifier_that_reads_others_is_refused(slim):
    model = mhacut.load_model(slim)
    model.reset_classifier(3, "token")
    assert model(torch.zeros(1, *VIT.size)).shape == (1, 3)
    with pytest.raises(UnsupportedModelError, match="global_pool='avg': this model computes only the tokens"):
        model.reset_classifier(3, "avg")
    assert model.global_pool == "token"


@pytest.mark.slow
def test_without_them_the_format_is_what_it_was(dense, tmp_path):
    result, lines = prune(dense, tmp_path / "slim.safetensors", keep_dead_tokens=True)
    assert lines == []
    assert not result.plan.tokens
    assert "blocks.2.attn.qkv.weight" in load_file(result.output)
    record = stated_by(result.output)
    assert record["format_version"] == 1
    assert "tokens" not in record


@pytest.mark.slow
@torch.no_grad()
def test_a_budget_that_tokens_alone_meet_cuts_no_channel(dense, tmp_path):
    result, _ = prune(dense, tmp_path / "slim.safetensors", flops="95%")
    assert all(unit.keeps_all for unit in result.plan)
    model, x = mhacut.load_model(result.output), image(VIT)
    assert relative(model(x), build(VIT)(x)) < 1e-5


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"read": 2}, "the head reads 1 tokens, the plan expects 2"),
        (None, "keys missing|at most the keys|its tensors do not fit"),
    ],
    ids=repr,
)
def test_files_that_lie_about_tokens_are_refused(slim, tmp_path, tokens, message):
    record = {**stated_by(slim), "tokens": tokens}
    if tokens is None:
        del record["tokens"]
    path = tmp_path / "lie.safetensors"
    save_file(load_file(slim), path, {"format": "pt", "mhacut": json.dumps(record)})
    with pytest.raises(CheckpointError, match=message):
        mhacut.load_model(path)
