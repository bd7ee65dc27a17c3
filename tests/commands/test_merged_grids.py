"""A ViT with windows, from a checkpoint to a slim file that merges tokens, and what reads such a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mhacut
from helpers.cli import document_of, research, succeed
from helpers.files import ModelFile
from helpers.models import slow_but
from mhacut.surgery.tokens import tokens_of
from surgery.test_grid_merging import build

SIZES = {"embed_dim": 96, "depth": 4, "num_heads": 3, "img_size": 56, "patch_size": 4, "window_size": 8}
FEW = ["--calibration-images", "16", "--batch-size", "8", "--effort", "fast", "--no-latency"]


@pytest.fixture(scope="module")
def dense_file(tmp_path_factory) -> ModelFile:
    """Its 14 x 14 tokens lie in windows of 8 x 8, 3 of which are padded."""
    model = build("padding", **SIZES, neck_chans=16)
    model.pos_embed *= 0.05  # so that neighbours are alike
    path = tmp_path_factory.mktemp("sam") / "dense.safetensors"
    save_file(model.state_dict(), path)
    args = {**SIZES, "global_attn_indexes": [2], "neck_chans": 16, "num_classes": 5}
    return ModelFile(path, "samvit_base_patch16", args)


@pytest.fixture(scope="module")
def slim_file(dense_file, tmp_path_factory) -> Path:
    """Tuned, with merges that ``--scope auto`` has chosen."""
    output = tmp_path_factory.mktemp("slim") / "slim.safetensors"
    budget = ["--flops", "40%", "--preserve", "tokens", *research(tuning_steps=2)]
    found = succeed("prune", *dense_file.flags, *budget, *FEW, "-o", output)
    assert "scope: channels and token merging (merged tokens are copied back" in found.stderr
    return output


def test_a_file_merges_grids_and_opens_as_it_was_written(dense_file, slim_file):
    model = mhacut.load_model(slim_file)
    tokens = tokens_of(model)
    assert sum(tokens.merged) > 0
    assert tokens.to_json()["rule"] == "grid"
    assert tokens.grid == (14, 14)
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    assert model.forward_features(images).shape == (2, 16, 14, 14)
    document = document_of("inspect", slim_file)
    assert document["tokens"]["merged"] == list(tokens.merged)
    assert document["flops"] <= 0.4 * mhacut.inspect(dense_file.path, **dense_file.options).inspection.flops


@pytest.mark.parametrize("format", slow_but({"pt2"}, ["pt2", "onnx"]))
def test_a_file_can_be_exported(slim_file, tmp_path, format):
    found = mhacut.export(slim_file, format=format, output=tmp_path / "exported")
    assert max(found.difference.values()) < 1e-4


def test_a_file_is_compared_and_drawn(dense_file, slim_file, tmp_path):
    """On the page of ``inspect``, against the dense model with the same merges."""
    options = ["--html", tmp_path / "page.html", "--calibration-images", "4"]
    compared = document_of("inspect", slim_file, "--compare", dense_file.path, *options)["comparison"]
    by_name = {layer["name"]: layer["tokens"] for layer in compared["layers"]}
    assert by_name["blocks.0.attn"] == 256  # with padding
    assert by_name["blocks.3.mlp"] < 196
    assert all(layer["error"] < 1.5 for layer in compared["layers"])


@pytest.mark.parametrize("scope", ["attention+mlp", "attention+mlp+tokens"])
def test_a_file_is_pruned_again_with_its_merges_or_others(slim_file, tmp_path, scope):
    output = tmp_path / "again.safetensors"
    options = ["--flops", "80%", "--preserve", "tokens", "--scope", scope, "-o", output]
    succeed("prune", slim_file, *options, *FEW, *research(heal_steps=0, tuning_steps=0))
    before, after = (tokens_of(mhacut.load_model(path)) for path in (slim_file, output))
    assert sum(after.merged) > 0
    if scope == "attention+mlp":
        assert before == after


def test_a_part_is_pruned_in_place_and_its_file_opens(tmp_path):
    options = {"scope": "attention+mlp+tokens", "effort": "fast", "tuning_steps": 0, "heal_steps": 0}
    model, opened = (build("whole windows", embed_dim=96) for _ in range(2))
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = images.repeat_interleave(8, 2).repeat_interleave(8, 3)
    for each in (model, opened):  # the map behind the neck is the output
        each.head = nn.Identity()
    result = mhacut.prune_(model, images=images.split(8), flops="50%", **options)
    assert sum(result.plan.tokens.merged) > 0
    mhacut.save_pruned(model, tmp_path / "slim.safetensors")
    mhacut.apply_pruned(opened, tmp_path / "slim.safetensors")
    assert torch.equal(opened(images), model(images))


def test_the_catalogue_lists_the_architectures():
    document = document_of("models", "samvit_*_224")
    assert [entry["tokens_stay"] for entry in document["models"]] == [""]
