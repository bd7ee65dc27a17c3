"""What is always true of a cut, on every supported class, for any plan."""

from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.layers import AttentionPoolLatent
from torch.func import functional_call

from helpers.models import CASES, Case, build, image, relative
from helpers.plans import (
    assert_costs_are_what_fvcore_counts,
    assert_cut_by_name_and_shape,
    difference_of_kernels,
    difference_of_mask_and_cut,
    difference_of_nothing_cut,
    difference_of_two_cuts_and_one,
    random_plan,
    untrained,
)
from mhacut.finetuning.objective import Blocks
from mhacut.options.prune import SearchOptions
from mhacut.plan import Plan
from mhacut.pruning.calibrate import calibrate
from mhacut.pruning.candidates import find_candidates
from mhacut.pruning.repair import repair
from mhacut.pruning.weight_moments import white_moments
from mhacut.surgery.costs import build_cost_table
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.mask import masked_tensors
from mhacut.surgery.slice import cut, exact_scale

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id + "-" + "-".join(case.args))
few = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**32 - 1)


@each_case
def test_keeping_everything_changes_nothing(case):
    assert difference_of_nothing_cut(build(case), image(case)) < 1e-5


@each_case
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
@few
@given(seed=seeds)
def test_masked_equals_sliced(case, dtype, bound, seed):
    model, x = build(case, dtype=dtype), image(case, dtype=dtype)
    assert difference_of_mask_and_cut(model, x, seed) < bound


@each_case
def test_every_unit_matters(case):
    # Otherwise the comparisons here would prove nothing.
    model, x = build(case, dtype=torch.float64), image(case, dtype=torch.float64)
    prunable, dense = find_prunable_layers(model), model(x)
    for unit in prunable.units():
        dead = {unit.key: torch.zeros(unit.heads, unit.width, dtype=torch.float64)}
        assert relative(functional_call(model, masked_tensors(model, prunable, dead), (x,)), dense) > 1e-3


@each_case
@few
@given(seed=seeds)
def test_removing_dead_channels_changes_nothing(case, seed):
    model, x = build(case, dtype=torch.float64), image(case, dtype=torch.float64)
    prunable = find_prunable_layers(model)
    plan, _ = random_plan(prunable, seed)
    with torch.no_grad():
        for unit_plan in plan:
            unit = prunable.unit(unit_plan.key)
            alive = torch.zeros(unit.heads, unit.width, dtype=torch.float64)
            alive.scatter_(1, torch.tensor(unit_plan.kept), 1.0)
            for axis in unit.axes:
                parameter = model.get_submodule(unit.layer).get_parameter(axis.tensor)
                parameter.narrow(axis.dim, axis.offset, alive.numel()).mul_(
                    alive.reshape([-1 if d == axis.dim else 1 for d in range(parameter.dim())])
                )
        expected = model(x)
        cut(model, plan)
        assert relative(model(x), expected) < 1e-10


@each_case
@few
@given(seed=seeds)
def test_the_cost_table_is_what_fvcore_counts(case, seed):
    size = (3, case.args["img_size"], case.args["img_size"])
    assert_costs_are_what_fvcore_counts(build(case), size, seed)


@each_case
@few
@given(seed=seeds)
def test_fused_and_plain_attention_agree_at_any_batch(case, seed):
    model = build(case)
    plan, channel_scales = random_plan(find_prunable_layers(model), seed)
    cut(model, plan, channel_scales)
    with torch.no_grad():
        for batch in (1, 3):
            assert difference_of_kernels(model, image(case, batch=batch)) < 1e-4


@each_case
def test_a_slim_model_can_be_cut_again(case):
    model, x = build(case, dtype=torch.float64), image(case, dtype=torch.float64)
    assert difference_of_two_cuts_and_one(model, x, 3) < 1e-10


@each_case
def test_gradients_flow_in_training_mode(case):
    model = build(case)
    plan, _ = random_plan(find_prunable_layers(model), 5)
    cut(model, plan)
    assert untrained(model, image(case)) == set()


@each_case
def test_tensors_keep_their_names_and_shapes_alone_suffice(case):
    assert_cut_by_name_and_shape(build(case), image(case), 6)


@each_case
def test_timm_still_knows_the_slim_model(case):
    model, x = build(case), image(case)
    plan, _ = random_plan(find_prunable_layers(model), 7)
    cut(model, plan)
    assert model.forward_features(x).shape[-1] == model.num_features
    assert model.get_classifier() is not None
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)


def test_exact_gain_is_the_temperature():
    model = build(CASES[0])
    qk, v = (find_prunable_layers(model).unit(("blocks.0.attn", kind)) for kind in ("qk", "v"))
    assert exact_scale(qk, 16) == pytest.approx((16 / 64) ** 0.5)
    assert exact_scale(v, 16) == 1.0


def test_what_a_norm_runs_over_is_left_whole():
    kinds = {}
    for case in CASES:
        layers = find_prunable_layers(build(case)).layers
        kinds[case.id + str("qk_norm" in case.args)] = {
            kind for layer in layers for kind in layer.not_prunable
        }
    assert kinds["beit3_base_patch16_224False"] == {"v", "hidden"}
    assert kinds["vit_tiny_patch16_224True"] == {"qk"}
    assert kinds["vit_tiny_patch16_224False"] == set()


def test_a_pooling_head_without_projections_of_its_own_is_left_alone():
    args = {"depth": 1, "embed_dim": 24, "num_heads": 3, "img_size": 32, "patch_size": 8}
    prunable = find_prunable_layers(timm.create_model("vit_tiny_patch16_224", global_pool="prr", **args))
    assert prunable.skipped == ("attn_pool (AttentionPoolPrr): a pooling head is left alone",)
    assert not [unit for unit in prunable.units() if unit.layer.startswith("attn_pool")]


@pytest.mark.parametrize("built", [{"q_proj": False}, {"out_features": 0}], ids=str)
def test_a_pooling_head_that_is_built_otherwise_is_left_alone_too(built):
    model = build(CASES[0])
    model.attn_pool = AttentionPoolLatent(model.embed_dim, num_heads=3, **built)
    assert find_prunable_layers(model).skipped == (
        "attn_pool (AttentionPoolLatent): a pooling head is left alone",
    )


def test_a_pooling_head_is_a_block_of_its_own():
    model = build(next(case for case in CASES if "siglip" in case.architecture))
    assert Blocks(model).names == ("blocks.0", "blocks.1", "attn_pool")
    qk, v = (find_prunable_layers(model).unit(("attn_pool", kind)) for kind in ("qk", "v"))
    assert white_moments(model.attn_pool, qk) is None  # its queries are made of nothing that varies
    assert white_moments(model.attn_pool, v) is not None


@torch.no_grad()
def test_a_pooling_head_attends_with_one_channel():
    """Its queries are the same for every image, so that one direction of each head's keys counts."""
    siglip = next(case for case in CASES if "siglip" in case.architecture)
    model, images = build(siglip, dtype=torch.float64), torch.randn(8, 3, 32, 32, dtype=torch.float64)
    unit = find_prunable_layers(model).unit(("attn_pool", "qk"))
    dense = model(images)
    moments = calibrate(model, find_prunable_layers(model), images, batch_size=4).moments
    (candidate,) = find_candidates(
        model.attn_pool, unit, moments[unit.key], 1, SearchOptions(basis="principal")
    )
    plan = Plan((candidate.plan(1),))
    repair(model, find_prunable_layers(model), plan, moments, candidates={unit.key: (candidate,)})
    cut(model, plan)
    assert model.attn_pool.q.out_features == unit.heads
    assert relative(model(images), dense) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    [
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "deit3_small_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_siglip_224",
        "vit_base_patch32_clip_quickgelu_224",
        "aimv2_large_patch14_224",
    ],
)
def test_at_full_size(architecture):
    import timm

    shape = {"img_size": 224} if "dinov2" in architecture else {}
    model = build(Case(architecture, shape))
    prunable = find_prunable_layers(model)
    plan, channel_scales = random_plan(prunable, 11)
    size = (3, 224, 224)
    table = build_cost_table(model, prunable, size)
    x = torch.randn(1, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        masked = functional_call(model, masked_tensors(model, prunable, channel_scales), (x,))
        cut(model, plan, channel_scales)
        assert relative(model(x), masked) < 1e-4
    assert measure_flops(model, size) == table.flops(plan.widths())
    assert timm.create_model(architecture, **shape).state_dict().keys() == model.state_dict().keys()
