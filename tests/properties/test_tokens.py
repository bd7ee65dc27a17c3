"""Models that leave out tokens compute what the whole model does."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

from helpers.models import ModelCase, build, double, image, relative, slow_except
from helpers.plans import random_plan
from mhacut.checkpoint.build import allocate
from mhacut.errors import PlanError, UnsupportedModelError
from mhacut.plan import Plan, TokenPlan
from mhacut.surgery.costs import build_cost_table
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.output_tokens import tokens_read_by_head
from mhacut.surgery.slice import cut
from mhacut.surgery.tokens import apply_tokens, tokens_of


def reading(architecture: str = "vit_tiny_patch16_224", **args: object) -> ModelCase:
    small = {"depth": 2, "img_size": 48, "embed_dim": 24, "num_heads": 3}
    return ModelCase(architecture, {**small, **args})


def rotary(architecture: str, **args: object) -> ModelCase:
    return reading(architecture, **{"embed_dim": 48, **args})


TOKEN = {"global_pool": "token"}
READING = {
    "plain": reading(),
    "not square": reading(img_size=[32, 64]),
    "registers": reading(reg_tokens=2, no_embed_class=True),
    "distilled": reading("deit_tiny_distilled_patch16_224"),
    "layer scale": reading("deit3_small_patch16_224"),
    "normalised": reading(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True),
    "no biases": reading(qkv_bias=False, proj_bias=False),
    "norms behind": reading("vit_base_patch16_rpn_224", class_token=True, **TOKEN),
    "rotary": rotary("vit_small_patch16_rope_224"),
    "rotary, mixed": rotary("vit_small_patch16_rope_mixed_ape_224"),
    "rotary, halves, registers": rotary("vit_base_patch16_sapiens2", num_heads=4, num_kv_heads=2),
    "eva": rotary("eva02_tiny_patch14_224", img_size=42, patch_size=14, **TOKEN),
    "eva, separate projections": rotary("eva02_base_patch16_clip_224"),
    "eva without rotation": rotary("eva_giant_patch14_clip_224", img_size=42),
    "eva, registers, halves": rotary("vit_small_patch16_lingbot"),
    "eva, normalised": rotary("eva02_tiny_patch14_224", img_size=42, qk_norm=True, **TOKEN),
    "eva, norms behind": rotary("eva02_enormous_patch14_clip_224", img_size=42),
    "beit": reading("beit_base_patch16_224", img_size=[32, 64], **TOKEN),
    "beit, shared positions": reading(
        "beit_base_patch16_224", use_rel_pos_bias=False, use_shared_rel_pos_bias=True, **TOKEN
    ),
    "beit, both positions": reading(
        "beit_base_patch16_224", use_shared_rel_pos_bias=True, init_values=None, qkv_bias=False, **TOKEN
    ),
    "relative positions": reading("vit_relpos_base_patch16_cls_224", img_size=[32, 64]),
    "relative positions, shared": reading(
        "vit_relpos_base_patch16_cls_224", shared_rel_pos=True, rel_pos_type="bias", qk_norm=True
    ),
    "relative positions, norms behind": reading(
        "vit_relpos_base_patch16_rpn_224", class_token=True, rel_pos_type="bias", **TOKEN
    ),
}
"""Models whose head reads their first tokens only."""
OTHERS = {
    "averaging": (reading(global_pool="avg"), "head reads all tokens"),
    "pooling head": (reading(global_pool="map"), "head reads all tokens"),
    "other attention": (
        reading("vit_dpwee_patch16_reg1_gap_256", class_token=True, global_pool="token"),
        "ParallelScaling",
    ),
    "differential attention": (
        reading("vit_dwee_patch16_reg1_gap_256", num_heads=2, class_token=True, **TOKEN),
        "attention of class DiffAttention",
    ),
    "blocks side by side": (reading("vit_base_patch16_18x2_224"), "ParallelThingsBlock"),
    "averaging eva": (reading("eva02_tiny_patch14_224"), "head reads all tokens"),
    "averaging beit": (reading("beit_base_patch16_224"), "head reads all tokens"),
    "another model": (
        ModelCase("cait_xxs24_224", {"depth": 1, "img_size": 32, "embed_dim": 24, "num_heads": 3}),
        "the head of Cait reads",
    ),
}
"""Models of which all tokens are computed, and what of the reason."""


FAST = {
    "plain",
    "registers",
    "distilled",
    "rotary",
    "eva",
    "eva, registers, halves",
    "beit",
    "relative positions",
}


@pytest.fixture(params=slow_except(FAST, READING))
def reader(request):
    return READING[request.param]


@torch.no_grad()
def test_what_is_not_read_changes_no_logit(reader):
    for dtype, most in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model, x = build(reader, dtype=dtype), image(reader, dtype=dtype)
        expected = model(x)
        apply_tokens(model, TokenPlan(output_tokens=tokens_read_by_head(model)))
        assert relative(model(x), expected) < most


@torch.no_grad()
def test_a_mask_or_bias_is_that_of_the_whole_model(reader):
    model, x = double(reader)
    tokens = model.blocks[-1].norm1(model.forward_features(x))
    mask = torch.rand(2, 1, 1, tokens.shape[1]) > 0.3
    last, read = copy.deepcopy(model.blocks[-1]), tokens_read_by_head(model)
    *_, argument = inspect.signature(last.forward).parameters
    cases: tuple[dict, ...] = ({"attn_mask": mask}, {"is_causal": True})
    if argument.startswith("shared"):
        heads = last.attn.num_heads
        cases = ({argument: torch.rand(1, heads, *[tokens.shape[1]] * 2, dtype=torch.float64)},)
    apply_tokens(model, TokenPlan(output_tokens=read))
    for options in cases:
        expected = last(tokens, **options)[:, :read]
        assert relative(model.blocks[-1](tokens, **options), expected) < 1e-12


@torch.no_grad()
def test_a_cut_applies_the_plan_and_two_cuts_are_one(reader):
    """Of a whole model and of one that was cut before; without weights, with weights to be filled in."""
    model, x = double(reader)
    outline, first = copy.deepcopy(model).to("meta"), random_plan(find_prunable_layers(model), 1)[0]
    cut(model, first)
    expected = model(x)
    tokens = TokenPlan(output_tokens=tokens_read_by_head(model))
    apply_tokens(model, tokens)
    assert relative(model(x), expected) < 1e-12
    second = Plan(random_plan(find_prunable_layers(model), 2)[0].units, tokens)
    cut(model, second)
    both = second.after(first)
    assert both.tokens == tokens_of(model) == tokens
    cut(outline, both)
    allocate(outline)
    outline.load_state_dict(model.state_dict())
    assert relative(outline.double()(x), model(x)) < 1e-12


@pytest.mark.parametrize("name", slow_except({"distilled", "eva", "beit"}, READING))
def test_costs_are_those_of_what_is_left(name):
    reader = READING[name]
    model = build(reader)
    dense = measure_flops(model, reader.size)
    apply_tokens(model, TokenPlan(output_tokens=tokens_read_by_head(model)))
    prunable = find_prunable_layers(model)
    table = build_cost_table(model, prunable, reader.size)
    assert table.dense == measure_flops(model, reader.size) < 0.9 * dense
    plan, _ = random_plan(prunable, 3)
    cut(model, plan)
    assert measure_flops(model, reader.size) == table.flops(plan.widths())


@torch.no_grad()
def test_copies_and_pickles_and_modes(reader):
    model, x = build(reader), image(reader)
    model.requires_grad_(False).train()
    apply_tokens(model, TokenPlan(output_tokens=tokens_read_by_head(model)))
    assert all(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    apply_tokens(model, tokens_of(model))  # once more


@pytest.mark.parametrize(("case", "reason"), OTHERS.values(), ids=OTHERS.keys())
def test_models_that_read_all_tokens_are_refused(case, reason):
    model = build(case)
    with pytest.raises(UnsupportedModelError, match=reason):
        tokens_read_by_head(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        cut(model, Plan((), TokenPlan(output_tokens=1)))
    assert not tokens_of(model)


def test_plans_for_another_head_are_refused():
    model = build(READING["distilled"])
    with pytest.raises(PlanError, match="reads 2 tokens"):
        apply_tokens(model, TokenPlan(output_tokens=1))
    apply_tokens(model, TokenPlan(output_tokens=2))
    with pytest.raises(PlanError, match="the last block computes 2 tokens"):
        apply_tokens(model, TokenPlan(output_tokens=1))


@pytest.mark.parametrize("name", ["registers", "rotary, halves, registers", "beit", "relative positions"])
@torch.no_grad()
def test_features_of_patches_that_are_not_there_are_refused(name):
    model, x = double(READING[name])
    expected = model.forward_intermediates(x, indices=[0], intermediates_only=True)
    features = model.forward_features(x)
    apply_tokens(model, TokenPlan(output_tokens=1))
    assert relative(model.forward_features(x), features[:, :1]) < 1e-12
    (found,) = model.forward_intermediates(x, indices=[0], intermediates_only=True)
    assert torch.equal(found, expected[0])
    for indices in (None, 1, [0, 1]):
        with pytest.raises(UnsupportedModelError, match="keep_dead_tokens=True"):
            model.forward_intermediates(x, indices=indices)
    if name == "registers":
        with pytest.raises(UnsupportedModelError, match="block 1"):
            model.get_intermediate_layers(x)
