"""Tokens merge in blocks of classes that nobody registered."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from torch import nn

import mhacut
from helpers.models import relative
from helpers.own_code import BUILDERS, OTHERS, Dinov2Block, Vit, tokens_of_own_code
from mhacut.adapters import structure
from mhacut.plan import TokenPlan
from mhacut.surgery import branches
from mhacut.surgery.tokens import apply_tokens, merged_of


def build(name, **options):
    torch.manual_seed(0)
    return Vit(BUILDERS[name], **options).eval().requires_grad_(False)


def smooth_images(count):
    noise = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return noise.repeat_interleave(8, 2).repeat_interleave(8, 3)  # neighbours are alike


@pytest.mark.parametrize("name", BUILDERS)
def test_merging_equal_tokens_changes_nothing(name):
    """Patches of an image of one colour are equal, without position embeddings."""
    model = build(name, first=1, last=2, positions=False)
    x = torch.randn(2, 3, 1, 1).expand(2, 3, 32, 32)
    merging = copy.deepcopy(model)
    apply_tokens(merging, TokenPlan(None, (20, 10), True, (1, 2)))
    assert merged_of(merging) == (20, 10)
    assert relative(merging(x), model(x)) < 1e-4
    noise = torch.randn(2, 3, 32, 32)
    assert relative(merging(noise), model(noise)) > 1e-3


@pytest.mark.parametrize("name", BUILDERS)
def test_zero_merges_give_the_outputs_of_the_model(name):
    model, x = build(name, first=1, last=2), torch.randn(2, 3, 32, 32)
    merging = copy.deepcopy(model)
    apply_tokens(merging, TokenPlan(None, (4, 0), True, (1, 2)))
    merging.blocks[0].matcher.count = 0
    assert relative(merging(x), model(x)) < 1e-5


@pytest.mark.parametrize("name", BUILDERS)
def test_a_model_is_pruned_with_merges_and_opens_again(name, tmp_path, monkeypatch):
    model, x = build(name, first=1, last=2), smooth_images(24)
    result = mhacut.prune_(model, "", images=x.split(8), flops="35%", effort="fast", tuning_steps=0)
    assert sum(result.plan.tokens.merged) > 0
    assert result.flops_after <= 0.35 * result.flops_before
    mhacut.save_pruned(model, tmp_path / "part.safetensors")
    monkeypatch.setattr(structure, "_PROVED", {})  # as in a new process
    monkeypatch.setattr(branches, "_FOUND", {})
    fresh = build(name, first=1, last=2)
    mhacut.apply_pruned(fresh, tmp_path / "part.safetensors")
    assert relative(fresh(x), model(x)) < 1e-6
    exported = torch.export.export(model, (x[:2],)).module()
    assert relative(exported(x[:2]), model(x[:2])) < 1e-5


@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 0), (1, 3)])
def test_class_and_detection_tokens_never_merge(first, last):
    model, x = build("dinov2", first=first, last=last), smooth_images(24)
    mhacut.prune_(model, "", images=x.split(8), flops="35%", effort="fast", tuning_steps=0)
    block = next(block for block in model.blocks if block.matcher is not None)
    assert block.outside == (first, last)
    sizes = tokens_of_own_code(model, block, x).sizes
    assert bool((sizes[:, : first + last] == 1).all())
    assert float(sizes[0].sum()) == first + 64 + last


def test_intermediate_layers_have_a_token_for_every_patch():
    model, x = build("dinov2", first=1, levels=(0, 1)), smooth_images(24)
    dense = model(x)
    result = mhacut.prune_(model, "", images=x.split(8), flops="40%", effort="fast", tuning_steps=0)
    assert sum(result.plan.tokens.merged) > 0
    assert model(x).shape == dense.shape
    merging = build("dinov2", first=1, levels=(0, 1))
    apply_tokens(merging, TokenPlan(None, (4, 0), True, (1, 0)))
    merging.blocks[0].matcher.count = 0
    assert relative(merging(x), dense) < 1e-5


@pytest.mark.parametrize("name", ["rotary", "normed after", "mixing"])
def test_tokens_of_other_blocks_stay(name):
    torch.manual_seed(0)
    model, x = Vit(OTHERS[name]).eval().requires_grad_(False), smooth_images(24)
    result = mhacut.prune_(model, "", images=x.split(8), flops="80%", effort="fast", tuning_steps=0)
    assert result.plan.tokens.merged == ()


def test_each_factor_of_a_block_needs_its_own_proof():
    class Scaled(Dinov2Block):
        alpha = 1.0

        def forward(self, x):
            x = x + self.alpha * self.ls1(self.attn(self.norm1(x)))
            return x + self.ls2(self.mlp(self.norm2(x)))

    whole, half = Scaled(32), Scaled(32)
    whole.alpha, half.alpha = 1.0, 0.5
    assert branches.branches_of(whole.eval()) is not None
    assert branches.branches_of(half.eval()) is None


def test_a_model_that_runs_its_vit_twice_is_pruned():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            args = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "img_size": 32}
            self.vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, **args)

        def forward(self, x):
            return self.vit.forward_features(x) - self.vit.forward_features(x.flip(-1))

    model = Siamese().eval()
    result = mhacut.prune_(model, "", images=smooth_images(16).split(8), flops="70%", effort="fast")
    assert result.flops_after <= 0.7 * result.flops_before


def test_a_block_of_which_tokens_merge_trains():
    model = build("dinov2", first=1)
    apply_tokens(model, TokenPlan(None, (4, 4), True, (1, 0)))
    model.train().requires_grad_(True)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())
    assert isinstance(model.blocks[0], nn.Module)


def test_positions_between_blocks_are_averaged_over_the_patches_of_a_token():
    model, x = build("dinov2", first=1, last=3, between=True), smooth_images(24)
    merging = copy.deepcopy(model)
    apply_tokens(merging, TokenPlan(None, (4, 0), True, (1, 3)))
    merging.blocks[0].matcher.count = 0
    assert relative(merging(x), model(x)) < 1e-5
    mhacut.prune_(model, "", images=x.split(8), flops="40%", effort="fast", tuning_steps=0)
    first, last = model.blocks
    assert tokens_of_own_code(model, first, x).x.shape[1] < 68
    assert last.unmerge
    assert model(x).shape[1] == 68
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (x[:2],), dynamic_shapes=({0: batch},), strict=False).module()
    assert relative(exported(x[:5]), model(x[:5])) < 1e-5


class Strict(Vit):
    def forward(self, x):
        x = self.patch_embed(x).flatten(2).mT + self.positions
        for block in self.blocks:
            assert isinstance(x, torch.Tensor)
            x = block(x=x)
        return x


def test_tokens_stay_where_code_between_blocks_takes_tensors_only():
    torch.manual_seed(0)
    model, x = Strict(BUILDERS["dinov2"]).eval().requires_grad_(False), smooth_images(24)
    result = mhacut.prune_(model, "", images=x.split(8), flops="80%", effort="fast", tuning_steps=0)
    assert result.plan.tokens.merged == ()


class Classifier(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.vit, self.head, self.num_classes = build(name), nn.Linear(32, 5), 5

    def forward(self, x):
        return self.head(self.vit(x)[:, 0])


@pytest.mark.parametrize("name", BUILDERS)
def test_a_class_token_classifier_copies_no_tokens_back(name, tmp_path):
    torch.manual_seed(0)
    model, x = Classifier(name).eval().requires_grad_(False), smooth_images(24)
    fresh = copy.deepcopy(model)
    result = mhacut.prune_(model, "", images=x.split(8), flops="45%", effort="fast", tuning_steps=2)
    assert sum(result.plan.tokens.merged) > 0
    assert not result.plan.tokens.unmerge
    assert model.vit(x).shape[1] < 65
    mhacut.save_pruned(model, tmp_path / "part.safetensors")
    mhacut.apply_pruned(fresh, tmp_path / "part.safetensors")
    assert relative(fresh(x), model(x)) < 1e-6


@pytest.mark.parametrize("name", ["dinov2", "tokens first"])
def test_the_class_tokens_attention_weighs_tokens(name):
    model, x, seen = build(name).double(), torch.randn(2, 3, 32, 32).double(), []
    apply_tokens(model, TokenPlan(None, (20, 10), False, (1, 0)))
    for block in model.blocks:
        block.matcher.register_forward_pre_hook(lambda _, args: seen.append((args[0].sizes, args[1])))
        block.attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    for block, y, (sizes, weights) in zip(model.blocks, seen[::2], seen[1::2], strict=True):
        y = y.transpose(0, 1) if name == "tokens first" else y
        both = block.attn.qkv(y) if name == "dinov2" else y @ block.attn.in_proj_weight.T
        for image, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
            q, k = (both[image, :, start + 16 * head :][:, :16] for start in (0, 32))
            logits = [float(q[0] @ k[n]) / 4 + math.log(sizes[image, n]) for n in range(len(k))]
            assert relative(weights[image, head], torch.tensor(logits).double().softmax(0)) < 1e-6
