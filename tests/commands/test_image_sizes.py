"""Merging models at other image sizes than the planned size."""

from __future__ import annotations

import copy
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

import mhacut
from helpers.cli import document_of, run, succeed
from helpers.files import cut_into_file, save_dense
from helpers.models import ModelCase, build
from helpers.own_code import Dinov2Block, Vit
from mhacut.errors import PlanError
from mhacut.plan import Plan, TokenPlan
from mhacut.pruning.build_job import why_no_merging
from mhacut.pruning.preserve import ANSWERS
from mhacut.surgery.flops import executed_flops, measure_flops
from mhacut.surgery.hooks import captured_outputs
from mhacut.surgery.tokens import apply_tokens, tokens_of, with_tokens

ARGS = {"depth": 4, "embed_dim": 48, "num_heads": 3, "img_size": 64, "dynamic_img_size": True}
VIT = ModelCase("vit_tiny_patch16_224", {**ARGS, "patch_size": 8})
FIXED = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 64}
SIDES = (32, 64, 72, 128)
OPTIONS = {"calibration_images": 12, "round_to": 4, "latency": False}
MERGING = {"scope": "attention+mlp+tokens", **OPTIONS}  # auto merges no tokens of a model this small


@pytest.fixture(scope="module")
def slim_file(tmp_path_factory):
    output = tmp_path_factory.mktemp("sizes") / "slim.safetensors"
    return mhacut.prune(build(VIT), flops="55%", output=output, model_args=VIT.args, **MERGING).output


def tokens_behind_blocks(model, image):
    """Return the number of patches in the model, and of tokens behind each block that merges."""
    matchers = [name for name, _ in model.named_modules() if name.endswith(".matcher")]
    with torch.no_grad(), captured_outputs(model, matchers, lambda args, output: output) as found:
        model(image)
    matches = [match for (match,) in found.values()]
    prefix = [model.get_submodule(name).prefix for name in matchers]
    left = [m.weights.shape[1] - m.merged.shape[1] - p for m, p in zip(matches, prefix, strict=True)]
    return matches[0].weights.shape[1] - prefix[0], left


@pytest.mark.parametrize("side", SIDES)
def test_each_block_merges_the_same_share_at_all_sizes(slim_file, side):
    model = mhacut.load_model(slim_file)
    merged = [count for count in mhacut.inspect(slim_file).inspection.tokens.merged if count]
    planned = [64 - total for total in accumulate(merged)]
    patches, left = tokens_behind_blocks(model, torch.randn(1, 3, side, side))
    assert patches == (side // 8) ** 2
    assert left == [-(-patches * tokens // 64) for tokens in planned]


def test_files_without_the_planned_size_merge_the_same_number_at_all_sizes(slim_file):
    model = mhacut.load_model(slim_file)
    plan = mhacut.inspect(slim_file).inspection.tokens
    document = {key: value for key, value in plan.to_json().items() if key != "patches"}
    old = build(VIT)
    apply_tokens(old, type(plan).from_json(document))
    merged = [count for count in plan.merged if count]
    for side in (64, 128):
        patches, left = tokens_behind_blocks(old, torch.randn(1, 3, side, side))
        assert left == [patches - total for total in accumulate(merged)]
        same = left == tokens_behind_blocks(model, torch.randn(1, 3, side, side))[1]
        assert same == (side == 64)


def test_a_smaller_model_of_one_size_merges_the_same_share():
    model = build(ModelCase("vit_tiny_patch16_224", {**FIXED, "img_size": 32, "patch_size": 8}))
    apply_tokens(model, TokenPlan(merged=(20, 10), patches=64))
    assert tokens_behind_blocks(model, torch.randn(1, 3, 32, 32)) == (16, [11, 9])
    with pytest.raises(PlanError, match="block 1 has 44 patches and merges at most 22, found 23"):
        apply_tokens(model, TokenPlan(merged=(20, 23), patches=64))


def test_the_same_merges_planned_for_another_size_replace_the_old():
    model = build(VIT)
    small, large = (TokenPlan(merged=(4, 2, 0, 0), patches=patches) for patches in (16, 64))
    apply_tokens(model, small)
    assert with_tokens(model, large).blocks[1].matcher.planned == (64, 58)
    assert with_tokens(model, small) is model
    apply_tokens(model, large)
    assert model.blocks[1].matcher.planned == (64, 58)


def test_a_check_at_another_size_leaves_the_merges_of_a_slim_model(slim_file):
    model = mhacut.load_model(slim_file)
    assert why_no_merging(model, ANSWERS, (3, 128, 128)) == ""
    assert tokens_of(model).patches == 64


class AnySize(Vit):
    """ViT of own code that takes all image sizes."""

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat((self.first.expand(len(x), -1, -1), x), 1)
        for block in self.blocks:
            x = block(x)
        return x


def test_a_pruned_backbone_of_own_code_saves_as_much_at_all_sizes():
    torch.manual_seed(0)
    dense = AnySize(Dinov2Block, depth=4).eval().requires_grad_(False)
    slim = copy.deepcopy(dense)
    images = F.interpolate(torch.randn(24, 3, 8, 8), size=(32, 32), mode="bilinear")
    mhacut.prune_(slim, "", images=images.split(8), flops="60%", effort="fast", tuning_steps=0)
    for side in (20, 32, 60):
        image = torch.randn(1, 3, side, side)
        assert slim(image).shape == dense(image).shape
        flops = [executed_flops(lambda model=model, image=image: model(image)) for model in (slim, dense)]
        assert flops[0] / flops[1] < 0.66


def test_inspect_shows_the_flops_of_models_that_take_several_sizes(slim_file, tmp_path):
    found = document_of("inspect", slim_file, "--shapes")["flops_by_side"]
    assert list(found) == ["32", "64", "128"]
    model = mhacut.load_model(slim_file)
    assert list(found.values()) == [measure_flops(model, (3, side, side)) for side in (32, 64, 128)]
    page = tmp_path / "page.html"
    shown = succeed("inspect", slim_file, "--shapes", "--html", page).stdout
    assert "FLOPs by image height: 32: " in shown
    assert "FLOPs by image height: 32: " in page.read_text()
    fixed = save_dense(build(ModelCase("vit_tiny_patch16_224", FIXED)), tmp_path / "fixed.safetensors")
    found = mhacut.inspect(fixed, model="vit_tiny_patch16_224", model_args=FIXED, shapes=True)
    assert found.inspection.flops_by_side == {}


@pytest.mark.parametrize("format", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_an_exported_file_takes_several_sizes_merges_included(format, slim_file, tmp_path):
    output = tmp_path / f"slim.{format}"
    result = succeed("export", slim_file, "--format", format, "--dynamic-size", "-o", output)
    assert "any image size, compared at 3x32x32 3x64x64 3x128x128" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_an_exported_backbone_copies_merged_tokens_back_at_all_sizes(format, tmp_path):
    output = tmp_path / f"backbone.{format}"
    plan = Plan((), TokenPlan(merged=(20, 12, 8, 0), unmerge=True, patches=64))
    file = cut_into_file(build(VIT), plan, tmp_path / "backbone.safetensors", VIT)
    result = succeed("export", file, "--format", format, "--dynamic-size", "-o", output)
    assert "any image size, compared at 3x32x32 3x64x64 3x128x128" in result.stdout


def test_a_model_of_one_size_is_refused_before_the_export(tmp_path):
    fixed = save_dense(build(ModelCase("vit_tiny_patch16_224", FIXED)), tmp_path / "fixed.safetensors")
    options = ["--model", "vit_tiny_patch16_224"]
    options += [word for key, value in FIXED.items() for word in ("--model-arg", f"{key}={value}")]
    result = run("export", fixed, *options, "--format", "pt2", "--dynamic-size", "-o", tmp_path / "a.pt2")
    assert result.exit_code == 1
    assert "vit_tiny_patch16_224 does not take 3x32x32: AssertionError" in result.stderr
    assert "dynamic_img_size=True" in result.stderr
    assert not (tmp_path / "a.pt2").exists()
