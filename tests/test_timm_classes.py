"""What is always true of a cut, on every attention class of timm that can be cut, for any plan."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from timm.layers.attention import AttentionRope
from timm.models.coat import FactorAttnConvRelPosEnc
from torch import nn
from torch.func import functional_call

import mhacut
from helpers.models import relative
from helpers.plans import (
    assert_costs_are_what_fvcore_counts,
    assert_cut_by_name_and_shape,
    difference_of_kernels,
    difference_of_mask_and_cut,
    difference_of_nothing_cut,
    difference_of_turned_channels,
    difference_of_two_cuts_and_one,
    random_plan,
    untrained,
)
from mhacut.plan import Plan, UnitPlan
from mhacut.pruning.calibrate import UnitMoments, calibrate
from mhacut.pruning.repair import repair
from mhacut.surgery.find import PrunableLayers, find_prunable_layers
from mhacut.surgery.mask import masked_tensors, run_with
from mhacut.surgery.slice import cut
from timm_cases import CASES, Case, build, image

QUICK = {"rope half", "nest", "swin v2"}
"""One of a kind; the others are like one of these, and take minutes together."""
each_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)
SEEDS = (0, 1, 2)


def kill(model: nn.Module, prunable: PrunableLayers, plan: Plan) -> None:
    """Zero every row that makes a removed channel, in place, or what reads it."""
    for unit_plan in plan:
        unit = prunable.unit(unit_plan.key)
        gone = torch.ones(unit.heads, unit.width, dtype=torch.bool)
        gone.scatter_(1, torch.tensor(unit_plan.kept), False)
        module = model.get_submodule(unit.layer)
        by_reader = unit.kind == "hidden"  # an activation of 0 need not be 0
        for axis in unit.axes:
            if (axis == unit.output_projection) != by_reader or (axis.shared and unit_plan.unshared):
                continue
            tensor = module.get_parameter(axis.tensor).detach()
            first, last = (0, 1) if axis.shared else axis.heads or (0, unit.heads)
            rows = axis.rows(unit.heads, unit.width)[gone[first:last]].flatten()
            tensor.index_fill_(axis.dim, rows, 0)


@each_case
@torch.no_grad()
def test_keeping_everything_changes_nothing(case):
    assert difference_of_nothing_cut(build(case), image(case)) < 1e-12


@each_case
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
@torch.no_grad()
def test_masked_equals_sliced(case, dtype, bound):
    dense, x = build(case, dtype=dtype), image(case, dtype=dtype)
    for seed in SEEDS:
        assert difference_of_mask_and_cut(dense, x, seed) < bound


@each_case
@torch.no_grad()
def test_removing_dead_channels_changes_nothing(case):
    for seed in SEEDS:
        model, x = build(case), image(case)
        prunable = find_prunable_layers(model)
        plan, _ = random_plan(prunable, seed)
        kill(model, prunable, plan)
        expected = model(x)
        cut(model, plan)
        assert relative(model(x), expected) < 1e-10


@each_case
@torch.no_grad()
def test_every_unit_matters_and_every_kind_is_cut_or_left_whole_for_a_reason(case):
    model, x = build(case), image(case)
    prunable, dense = find_prunable_layers(model), model(x)
    assert {kind for layer in prunable.layers for kind in layer.not_prunable} == case.whole
    for layer in prunable.layers:
        kinds = {unit.kind for unit in layer.units} | set(layer.not_prunable) | set(layer.coupled_with)
        behind = {"hidden"} if layer.result else set()  # a pooling head has its own MLP
        assert kinds == ({"qk", "v"} | behind if layer.adapter.family == "attention" else {"hidden"})
    for unit in prunable.units():
        dead = {unit.key: torch.zeros(unit.heads, unit.width, dtype=torch.float64)}
        assert relative(run_with(model, masked_tensors(model, prunable, dead), x), dense) > 1e-4


@each_case
def test_the_cost_table_is_what_fvcore_counts(case):
    for seed in SEEDS[:2]:
        model = build(case, dtype=torch.float32)
        assert_costs_are_what_fvcore_counts(model, (3, case.size, case.size), seed)


@each_case
@torch.no_grad()
def test_fused_and_plain_attention_agree(case):
    model = build(case)
    plan, channel_scales = random_plan(find_prunable_layers(model), 2)
    cut(model, plan, channel_scales)
    assert difference_of_kernels(model, image(case, batch=3)) < 1e-12


@each_case
@torch.no_grad()
def test_a_slim_model_can_be_cut_again(case):
    assert difference_of_two_cuts_and_one(build(case), image(case), 3) < 1e-10


@each_case
def test_gradients_flow_in_training_mode(case):
    model = build(case)
    before = untrained(copy.deepcopy(model), image(case))
    plan, _ = random_plan(find_prunable_layers(model), 5)
    cut(model, plan)
    assert untrained(model, image(case)) == before


@each_case
def test_tensors_keep_their_names_and_shapes_alone_suffice(case):
    assert_cut_by_name_and_shape(build(case), image(case), 6)


@each_case
@torch.no_grad()
def test_turned_channels_compute_what_they_did(case):
    assert difference_of_turned_channels(build(case), image(case)) < 1e-9


@pytest.mark.slow
@each_case
def test_pruned_without_data_written_and_read_back(case, tmp_path):
    """The whole way: calibrated, repaired, cut, checked, saved; and the same logits from the file."""
    dense = build(case, dtype=torch.float32)
    tensors = {name: tensor.clone() for name, tensor in dense.state_dict().items()}  # CoaT shares some
    save_file(tensors, tmp_path / "dense.safetensors")
    result = mhacut.prune(
        tmp_path / "dense.safetensors",
        flops=f"{case.share}%",
        model=case.architecture,
        model_args={**case.args, "num_classes": 5},
        calibration_images=4,
        round_to=2,
        latency=False,
        img_size=case.size,
        output=tmp_path / "slim.safetensors",
    )
    assert result.slim.flops <= case.share / 100 * result.dense.flops
    slim, again = (mhacut.load_model(result.output) for _ in range(2))
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in dense.parameters())
    x, more = (image(case, batch=batch, dtype=torch.float32) for batch in (2, 3))
    with torch.no_grad():
        assert torch.equal(slim(x), again(x))
        assert slim(x).isfinite().all()
        program = torch.export.export(slim, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        assert relative(program.module()(more), slim(more)) < 1e-5


@pytest.mark.parametrize("half", [False, True], ids=["interleaved", "half"])
@torch.no_grad()
def test_a_gate_beside_turned_channels(half):
    # No model of timm has one.
    torch.manual_seed(0)
    attention = AttentionRope(24, 3, num_prefix_tokens=1, gated=True, rotate_half=half).double().eval()
    model = nn.ModuleDict({"attn": attention})
    x, rope = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(4, 16, dtype=torch.float64)
    prunable = find_prunable_layers(model)
    assert {unit.kind: unit.mixing for unit in prunable.units()} == {"qk": "select", "v": "refit"}
    plan, channel_scales = random_plan(prunable, 1)
    masked = {
        name.removeprefix("attn."): tensor
        for name, tensor in masked_tensors(model, prunable, channel_scales).items()
    }
    expected = functional_call(attention, masked, (x, rope))
    cut(model, plan, channel_scales)
    assert relative(model["attn"](x, rope), expected) < 1e-10


@pytest.mark.parametrize("gated", [False, True], ids=["free", "gated"])
@torch.no_grad()
def test_values_that_heads_share_are_refitted_for_each_that_reads_them(gated):
    torch.manual_seed(0)
    attention = AttentionRope(
        24, 4, qkv_fused=False, num_kv_heads=2, num_prefix_tokens=0, gated=gated, dim_out=10
    )
    attention.double().eval().requires_grad_(False)
    model, x = nn.Sequential(OrderedDict(attn=attention)), torch.randn(9, 5, 24).double()
    prunable, read = find_prunable_layers(model), []
    (unit,) = prunable.units()
    attention.proj.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    seen = calibrate(model, prunable, x, batch_size=9).moments[unit.key].every
    rows = torch.cat(read).view(9, 5, 2, 2, 6)  # (B, N, heads of values, heads of queries, d)
    kept = ((0, 3, 5), (1, 2, 4))
    plan = Plan((UnitPlan("attn", "v", 6, kept),))
    stays = [(head, channel) for head in range(2) for channel in kept[head]]
    goes = [(head, channel) for head in range(2) for channel in range(6) if channel not in kept[head]]
    # Both heads of queries of every head of values at once: one regression for all.
    inputs = torch.stack([rows[:, :, head, :, channel].flatten() for head, channel in stays], 1)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
    wanted = torch.stack([rows[:, :, head, :, channel].flatten() for head, channel in goes], 1)
    solution = torch.linalg.lstsq(inputs, wanted).solution
    before, bias = attention.proj.weight.clone().view(10, 2, 2, 6), attention.proj.bias.clone()
    expected, constant = before.clone(), bias.clone()
    for query in range(2):
        for number, (head, channel) in enumerate(goes):
            lost = before[:, head, query, channel]
            constant += lost * solution[-1, number]
            for place, (other, stayed) in enumerate(stays):
                expected[:, other, query, stayed] += lost * solution[place, number]
            expected[:, head, query, channel] = 0
    repair(model, prunable, plan, {unit.key: UnitMoments(seen, seen)})
    assert relative(attention.proj.weight.view(10, 2, 2, 6), expected) < 1e-5
    assert relative(attention.proj.bias, constant) < 1e-5
    repaired = model(x)
    cut(model, plan)
    assert relative(model(x), repaired) < 1e-12
    assert attention.v_proj.out_features == 2 * 3


@torch.no_grad()
def test_which_pairs_turn_how():
    """A slim layer looks up the angles of the pairs it kept, in every head its own."""
    torch.manual_seed(0)
    attention = AttentionRope(8, 2, num_prefix_tokens=0, rotate_half=True).double().eval()
    model = nn.ModuleDict({"attn": attention})
    cut(model, Plan((UnitPlan("attn", "qk", 2, ((1,), (0,))),)))
    assert model["attn"].turned_channels.tolist() == [[1, 3], [0, 2]]
    assert model["attn"].qkv.out_features == 2 * 4 + 8


@pytest.mark.parametrize("depths", [(2, 2, 1, 1), (1, 0, 1, 1)], ids=["two", "none"])
@pytest.mark.parametrize("whole", [0, 1, 2])
@torch.no_grad()
def test_layers_that_shared_a_convolution_are_cut_each_by_itself(depths, whole):
    args = {"img_size": 64, "embed_dims": (16,) * 4, "serial_depths": depths, "parallel_depth": 1}
    case = Case("coat_tiny", args, 64)
    model, x = build(case), image(case)
    prunable = find_prunable_layers(model)
    plan, channel_scales = random_plan(prunable, 7)
    units = [unit for number, unit in enumerate(plan) if number % 3 != whole]
    plan, channel_scales = Plan(tuple(units)), {unit.key: channel_scales[unit.key] for unit in units}
    expected = run_with(model, masked_tensors(model, prunable, channel_scales), x)
    cut(model, plan, channel_scales)
    assert relative(model(x), expected) < 1e-12
    layers = [module for module in model.modules() if isinstance(module, FactorAttnConvRelPosEnc)]
    for positions in (model.crpe1, model.crpe2, model.crpe3, model.crpe4):
        assert any(layer.crpe is positions for layer in layers)
