"""What is always true of a cut, on the FLatten Transformers and the softmax attention beside theirs."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from helpers.flatten import CASES, SIZE, SMALL, build, image
from helpers.models import relative
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
from mhacut.adapters.base import Unit
from mhacut.adapters.registry import adapter_for
from mhacut.errors import PlanError
from mhacut.flatten.attention import FocusedLinearAttention, focus, scale_with_gate
from mhacut.plan import Plan, UnitPlan
from mhacut.surgery.find import PrunableLayers, find_prunable_layers
from mhacut.surgery.mask import masked_tensors, set_gate
from mhacut.surgery.rotate import rotate
from mhacut.surgery.slice import cut

each_case = pytest.mark.parametrize("case", CASES)
few = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**32 - 1)


def without(model: nn.Module, prunable: PrunableLayers, plan: Plan) -> dict[str, Tensor]:
    """Tensors of ``model`` with all rows that make removed channels zero; gates for q/k."""
    tensors = {}
    for unit_plan in plan:
        unit = prunable.unit(unit_plan.key)
        alive = torch.zeros(unit.heads, unit.width, dtype=torch.float64)
        alive = alive.scatter(1, torch.tensor(unit_plan.kept), 1.0)
        if unit.gate is not None:
            tensors[f"{unit.layer}.{unit.gate}"] = alive.reshape(-1)
            continue
        for axis in unit.axes:
            if axis.tensor.startswith(("proj", "fc2", "dwc.", "attns.")):
                continue  # what reads dead channels may be anything, and so may biases of the convolutions
            name = f"{unit.layer}.{axis.tensor}"
            tensor = tensors.get(name, model.get_parameter(name)).clone()
            tensor.narrow(axis.dim, axis.offset, alive.numel()).mul_(
                alive.reshape([-1 if dim == axis.dim else 1 for dim in range(tensor.dim())])
            )
            tensors[name] = tensor
    return tensors


@each_case
@torch.no_grad()
def test_keeping_everything_changes_nothing(case):
    assert difference_of_nothing_cut(build(case), image()) < 1e-12


@each_case
@few
@given(seed=seeds)
@torch.no_grad()
def test_masked_equals_sliced(case, seed):
    assert difference_of_mask_and_cut(build(case), image(), seed) < 1e-9


@each_case
@torch.no_grad()
def test_masked_equals_sliced_in_single_precision(case):
    assert difference_of_mask_and_cut(build(case, dtype=torch.float32), image(torch.float32), 8) < 1e-4


@each_case
@torch.no_grad()
def test_every_unit_matters(case):
    model, x = build(case), image()
    prunable, dense = find_prunable_layers(model), model(x)
    assert prunable.skipped == ()
    assert {unit.kind for unit in prunable.units()} == {"qk", "v", "hidden"}
    for unit in prunable.units():
        channel_scale = torch.zeros(unit.heads, unit.width, dtype=torch.float64)
        channel_scale[:, 0] = 1.0  # without any features there would be no attention
        dead = {unit.key: channel_scale}
        if unit.width > 1:
            assert relative(functional_call(model, masked_tensors(model, prunable, dead), (x,)), dense) > 1e-4


@each_case
@few
@given(seed=seeds)
@torch.no_grad()
def test_removing_dead_channels_changes_nothing(case, seed):
    model, x = build(case), image()
    prunable = find_prunable_layers(model)
    plan, _ = random_plan(prunable, seed)
    for unit_plan in plan:  # what GELU makes of an MLP's constant channel is not zero
        unit = prunable.unit(unit_plan.key)
        for axis in unit.axes if unit.kind == "hidden" else ():
            if axis.tensor == "dwconv.bias":
                gone = torch.ones(unit.width, dtype=torch.bool)
                gone[list(unit_plan.kept[0])] = False
                model.get_submodule(unit.layer).get_parameter(axis.tensor)[gone] = 0
    expected = functional_call(model, without(model, prunable, plan), (x,))
    for name, tensor in without(model, prunable, plan).items():
        if not name.endswith("gate"):
            model.get_parameter(name).copy_(tensor)
    cut(model, plan)
    assert relative(model(x), expected) < 1e-9


@each_case
@settings(few, max_examples=2)  # fvcore is slow
@given(seed=seeds)
def test_the_cost_table_is_what_fvcore_counts(case, seed):
    assert_costs_are_what_fvcore_counts(build(case, dtype=torch.float32), SIZE, seed)


@each_case
@torch.no_grad()
def test_fused_and_plain_attention_agree(case):
    model = build(case)
    plan, channel_scales = random_plan(find_prunable_layers(model), 2)
    cut(model, plan, channel_scales)
    assert difference_of_kernels(model, image(batch=3)) < 1e-12


@each_case
@few
@given(seed=seeds)
@torch.no_grad()
def test_a_slim_model_can_be_cut_again(case, seed):
    assert difference_of_two_cuts_and_one(build(case), image(), seed) < 1e-9


@each_case
def test_gradients_flow_in_training_mode(case):
    model = build(case)
    plan, _ = random_plan(find_prunable_layers(model), 5)
    cut(model, plan)
    assert untrained(model, image()) == (
        {"norm.weight", "norm.bias"} if case == "flatten_pvt_tiny" else set()
    )


@each_case
def test_tensors_keep_their_names_and_shapes_alone_suffice(case):
    assert_cut_by_name_and_shape(build(case), image(), 6)


@each_case
def test_gradients_of_gains_reach_channels_that_are_masked(case):
    # Or the search could never take a channel back.
    model, x = build(case), image()
    prunable = find_prunable_layers(model)
    _, channel_scales = random_plan(prunable, 9)
    channel_scales = {key: channel_scale.requires_grad_() for key, channel_scale in channel_scales.items()}
    functional_call(model, masked_tensors(model, prunable, channel_scales), (x,)).square().sum().backward()
    for key, channel_scale in channel_scales.items():
        assert channel_scale.grad.isfinite().all(), key
        assert (channel_scale.grad != 0).double().mean() > 0.9, (
            key
        )  # features of q or k may be nowhere positive


def focused_layers(model: nn.Module) -> list[tuple[nn.Module, Unit, Unit]]:
    """(layer, qk unit, v unit) of focused linear attention."""
    found = []
    for layer in find_prunable_layers(model).layers:
        units = {unit.kind: unit for unit in layer.units}
        if "qk" in units and units["qk"].linear:
            found.append((model.get_submodule(layer.name), units["qk"], units["v"]))
    return found


@pytest.mark.parametrize("case", SMALL)
def test_what_is_allowed_in_focused_attention(case):
    layers = focused_layers(build(case))
    assert layers
    for _, qk, v in layers:
        assert qk.mixing == "select"
        assert v.mixing == "refit"
        assert not qk.softmax_scaled
        assert (v.sharing == "copied") == (v.heads > 1)
        assert qk.scale_axes == ()


def test_softmax_beside_it_may_be_rotated_where_nothing_acts_on_single_channels():
    allowed = {}
    for case in ("flatten_swin_tiny_224", "flatten_cswin_tiny_224", "timm pvt"):
        units = [unit for unit in find_prunable_layers(build(case)).units(("qk", "v")) if not unit.linear]
        allowed[case] = {
            (unit.kind, unit.mixing == "rotate") for unit in units if unit.softmax_scaled or unit.kind == "v"
        }
    assert ("qk", True) in allowed["flatten_cswin_tiny_224"]
    assert ("v", True) not in allowed["flatten_cswin_tiny_224"]
    assert ("v", True) in allowed["flatten_swin_tiny_224"]
    assert allowed["timm pvt"] == {("qk", True), ("v", True)}


@pytest.mark.parametrize(
    "case",
    ["flatten_swin_tiny_224", "flatten_cswin_tiny_224", *(case for case in CASES if case not in SMALL)],
)
@pytest.mark.parametrize("slim", [False, True], ids=["dense", "slim"])
@torch.no_grad()
def test_turned_channels_compute_what_they_did(case, slim):
    model, x = build(case), image()
    if slim:
        cut(model, random_plan(find_prunable_layers(model), 4)[0])
    expected, turned = model(x), 0
    generator = torch.Generator().manual_seed(2)
    for unit in find_prunable_layers(model).units():
        if unit.mixing == "rotate":
            shape = unit.heads, unit.width, unit.width
            mixing = torch.randn(shape, generator=generator, dtype=torch.float64)
            rotate(model.get_submodule(unit.layer), unit, mixing + 3 * torch.eye(unit.width))
            turned += 1
    assert turned
    assert relative(model(x), expected) < 1e-9


@torch.no_grad()
def test_own_positions_need_filters_of_their_own():
    model = build("flatten_deit_tiny")
    unit = find_prunable_layers(model).unit(("blocks.0.attn", "v"))
    own = tuple((head, head + 2) for head in range(unit.heads))
    with pytest.raises(PlanError, match=r"its heads share dwc\.weight, dwc\.bias:"):
        cut(model, Plan((UnitPlan(unit.layer, "v", unit.width, own),)))
    equal = UnitPlan(unit.layer, "v", unit.width, ((1, 4),) * unit.heads)
    shared, unshared = copy.deepcopy(model), copy.deepcopy(model)
    cut(shared, Plan((equal,)))
    assert shared.blocks[0].attn.dwc.weight.shape[0] == 2
    cut(unshared, Plan((UnitPlan(unit.layer, "v", unit.width, equal.kept, unshared=True),)))
    assert unshared.blocks[0].attn.dwc.weight.shape[0] == 2 * unit.heads
    assert relative(shared(image()), unshared(image())) < 1e-12
    with pytest.raises(PlanError, match="its heads share nothing"):
        cut(model, Plan((UnitPlan("blocks.0.mlp", "hidden", 192, ((0,),), unshared=True),)))


@settings(max_examples=30, deadline=None)
@given(seed=seeds, channels=st.integers(2, 9), power=st.sampled_from([2, 3, 4]))
@torch.no_grad()
def test_a_gate_is_as_if_channels_were_not_there(seed, channels, power):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 5, channels, generator=generator, dtype=torch.float64)
    q[0] = k[1] = -1  # nothing passes the ReLU: only what is added after it is left
    scale = torch.randn(1, 1, channels, generator=generator, dtype=torch.float64)
    gate = 0.5 + torch.rand(channels, generator=generator, dtype=torch.float64)
    gate[torch.randperm(channels, generator=generator)[: channels - 1 - seed % (channels - 1)]] = 0
    kept = gate > 0
    merged = scale_with_gate(scale, gate, power)[..., kept]
    products = (gate * focus(q[None], scale, power, gate)) @ focus(k[None], scale, power, gate).mT
    expected = focus(q[None, :, kept], merged, power) @ focus(k[None, :, kept], merged, power).mT
    torch.testing.assert_close(products, expected, rtol=1e-9, atol=0)


def test_merging_gains_of_one_changes_no_bit():
    model = build("flatten_pvt_v2_b0", dtype=torch.float32)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    prunable = find_prunable_layers(model)
    units = [UnitPlan.keep_all(u.layer, u.kind, u.heads, u.width) for u in prunable.units()]
    cut(model, Plan(tuple(units)), {u.key: torch.ones(u.heads, u.width) for u in prunable.units()})
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("case", ["flatten_pvt_v2_b0", "flatten_cswin_tiny_224"])
@torch.no_grad()
def test_gains_that_were_trained_away_leave_nothing_of_a_kept_channel(case):
    model, x = build(case), image()
    prunable = find_prunable_layers(model)
    plan, channel_scales = random_plan(prunable, 3)
    for unit in prunable.units():
        if unit.width > 2:
            channel_scales[unit.key][:, :2] *= torch.tensor([0.0, -0.5], dtype=torch.float64)
    masked = functional_call(model, masked_tensors(model, prunable, channel_scales), (x,))
    cut(model, plan, channel_scales)
    assert relative(model(x), masked) < 1e-9


def test_a_gate_is_open_in_a_model_at_rest():
    model = build("flatten_swin_tiny_224")
    layer, qk, _ = focused_layers(model)[0]
    assert isinstance(layer, FocusedLinearAttention)
    assert layer.feature_gate is None
    set_gate(layer, qk, torch.ones(qk.heads, qk.width))
    assert layer.feature_gate.shape == (qk.heads * qk.width,)
    set_gate(layer, qk, None)
    assert layer.feature_gate is None
    assert not [key for key in model.state_dict() if "gate" in key]


def test_every_class_of_flatten_attention_has_an_adapter():
    def subclasses(cls):
        return [cls, *(sub for child in cls.__subclasses__() for sub in subclasses(child))]

    whole = [cls for cls in subclasses(FocusedLinearAttention) if hasattr(cls, "forward")]
    served = {type(module) for case in SMALL for module in build(case).modules() if adapter_for(module)}
    used = {type(module) for case in SMALL for module in build(case).modules()} & set(whole)
    # CSWin's is a branch of the attention that is served.
    assert {cls.__name__ for cls in used - served} == {"FocusedLepeAttention"}


def test_plans_say_what_is_unshared():
    plan = UnitPlan("blocks.0.attn", "v", 4, ((0, 1), (0, 2)), unshared=True)
    told = Plan((plan,)).to_json()
    assert told[0]["unshared"] is True
    assert Plan.from_json(told) == Plan((plan,))
    assert "unshared" not in Plan((UnitPlan("a", "v", 4, ((0, 1),)),)).to_json()[0]
    later = UnitPlan("blocks.0.attn", "v", 2, ((0,), (0,)))
    assert later.after(plan).unshared
    with pytest.raises(PlanError, match="unshared"):
        Plan.from_json([{**told[0], "unshared": 1}])
    assert all(a != b for a, b in pairwise([plan, later]))
