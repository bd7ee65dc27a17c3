"""What is always true of a cut, on the classes of :mod:`timm_cases_separate`."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
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
from mhacut.options.prune import SearchOptions
from mhacut.plan import Plan, UnitPlan
from mhacut.pruning.calibrate import UnitMoments, calibrate
from mhacut.pruning.candidates import find_candidates
from mhacut.pruning.repair import repair, shrink
from mhacut.surgery.axes import axes_of, channels_of, set_channels
from mhacut.surgery.find import PrunableLayers, find_prunable_layers
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.hooks import capturing
from mhacut.surgery.mask import masked_tensors
from mhacut.surgery.output import effective_output_weights
from mhacut.surgery.slice import cut
from timm_cases_separate import CASES, MODELS, WHOLE, build, image

QUICK = {"crossvit", "levit, convolutions", "xcit", "efficientvit_mit", "efficientvit_msra", "swiftformer"}
QUICK |= {"parallel, fused", "parallel diff"}
"""One of a kind; the others are like one of these, and take minutes together."""
each_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)
few = settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**32 - 1)


@torch.no_grad()
def kill(model: nn.Module, prunable: PrunableLayers, plan: Plan, revived: tuple[str, ...]) -> None:
    """Make zero what removed channels are made of, or how they are read in units that are ``revived``."""
    for unit_plan in plan:
        unit, module = prunable.unit(unit_plan.key), model.get_submodule(unit_plan.layer)
        gone = torch.ones(unit.heads, unit.width, dtype=torch.bool)
        gone.scatter_(1, torch.tensor(unit_plan.kept), False)
        for axis in axes_of(unit):
            if (axis == unit.output_projection) == (unit.kind in revived):
                channels = channels_of(module, unit, axis)
                first, last = (0, 1) if axis.shared else axis.heads or (0, unit.heads)
                channels[gone[first:last]] = 0
                set_channels(module, unit, axis, channels)


@each_case
@torch.no_grad()
def test_keeping_everything_changes_nothing(case):
    assert difference_of_nothing_cut(build(case), image(case)) < 1e-12


@each_case
@few
@given(seed=seeds)
@torch.no_grad()
def test_masked_equals_sliced(case, seed):
    assert difference_of_mask_and_cut(build(case), image(case), seed) < 1e-10


@each_case
@torch.no_grad()
def test_masked_equals_sliced_in_single_precision(case):
    model, x = build(case, dtype=torch.float32), image(case, dtype=torch.float32)
    assert difference_of_mask_and_cut(model, x, 8) < 1e-5


@each_case
@torch.no_grad()
def test_gains_survive_training_mode(case):
    # Where a batch norm looks at the batch, it undoes what is done to the rows before it.
    model, x = build(case), image(case)
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        pytest.skip("no batch norm")
    prunable = find_prunable_layers(model)
    plan, channel_scales = random_plan(prunable, 3)
    model.train()
    for module in model.modules():
        if type(module).__name__.startswith(("Drop", "Stochastic")):
            module.eval()
    masked = functional_call(copy.deepcopy(model), masked_tensors(model, prunable, channel_scales), (x,))
    cut(model, plan, channel_scales)
    assert relative(model(x), masked) < 1e-9


@each_case
@torch.no_grad()
def test_every_unit_matters(case):
    model, x = build(case), image(case)
    prunable, dense = find_prunable_layers(model), model(x)
    for unit in prunable.units():
        dead = {unit.key: torch.zeros(unit.heads, unit.width, dtype=torch.float64)}
        assert relative(functional_call(model, masked_tensors(model, prunable, dead), (x,)), dense) > 1e-6


@each_case
@few
@given(seed=seeds)
@torch.no_grad()
def test_removing_dead_channels_changes_nothing(case, seed):
    model, x = build(case), image(case)
    prunable = find_prunable_layers(model)
    plan, _ = random_plan(prunable, seed)
    kill(model, prunable, plan, case.revived)
    expected = model(x)
    cut(model, plan)
    assert relative(model(x), expected) < 1e-10


@each_case
@few
@given(seed=seeds)
def test_the_cost_table_is_what_fvcore_counts(case, seed):
    assert_costs_are_what_fvcore_counts(build(case, dtype=torch.float32), case.size, seed)


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
    assert difference_of_two_cuts_and_one(build(case), image(case), 3) < 1e-9


@each_case
def test_gradients_flow_in_training_mode(case):
    model = build(case)
    before = untrained(copy.deepcopy(model), image(case))
    plan, _ = random_plan(find_prunable_layers(model), 5)
    cut(model, plan)
    assert untrained(model, image(case)) == before


@each_case
def test_tensors_keep_their_names_and_shapes_are_known_without_data(case):
    assert_cut_by_name_and_shape(build(case), image(case), 6)


@each_case
@pytest.mark.parametrize("slim", [False, True], ids=["dense", "slim"])
@torch.no_grad()
def test_turned_channels_compute_what_they_did(case, slim):
    model, x = build(case), image(case)
    if slim:
        cut(model, random_plan(find_prunable_layers(model), 4)[0])
    assert difference_of_turned_channels(model, x) < 1e-9


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("mlp levit", "ln2.bn"),
        ("mlp shvit", "pw2.bn"),
        ("mlp efficientformer", "norm2"),
        ("levit", "proj.ln.bn"),
        ("shvit", "proj.1.bn"),
    ],
)
@torch.no_grad()
def test_what_removed_channels_gave_on_average_goes_into_the_norm_behind(name, norm):
    case = CASES[name]
    model, x = build(case).requires_grad_(False), image(case, batch=6)
    prunable = find_prunable_layers(model)
    unit = next(unit for unit in prunable.units(("v", "hidden")) if unit.layer == "layer")
    assert unit.output_norm == norm
    plan = Plan((UnitPlan("layer", unit.kind, unit.width, (tuple(range(2)),) * unit.heads),))
    for axis in unit.axes:  # what is to go becomes constant, not zero
        if axis != unit.output_projection and (axis.norm is not None or axis.tensor == "fc1.weight"):
            channels = channels_of(model.layer, unit, axis)
            channels[:, 2:] = 0
            set_channels(model.layer, unit, axis, channels)
    expected, moments = model(x), calibrate(model, prunable, x, batch_size=6).moments
    repair(model, prunable, plan, moments)
    cut(model, plan)
    assert relative(model(x), expected) < 1e-6


@torch.no_grad()
def test_heads_with_modules_of_their_own_are_heard_together():
    case, heard = CASES["efficientvit_msra"], {}
    model, x = build(case), image(case)
    attention = model.layer
    rows = [[] for _ in attention.qkvs]
    for head, qkv in enumerate(attention.qkvs):
        qkv.register_forward_hook(lambda module, args, output, head=head: rows[head].append(output))
    units = find_prunable_layers(model).units()
    with capturing(model, units, lambda unit, hook, channels: heard.update({(unit.kind, hook): channels})):
        model(x)
    qkv = torch.stack([row[0].movedim(1, -1) for row in rows], dim=-2)  # (B, H, W, heads, rows)
    assert torch.equal(heard["qk", "key"], qkv[..., 4:8])
    assert torch.equal(heard["v", "value"], qkv[..., 8:])
    convolved = [conv(row[0][:, :4]).movedim(1, -1) for conv, row in zip(attention.dws, rows, strict=True)]
    assert torch.equal(heard["qk", "query"], torch.stack(convolved, dim=-2))


@pytest.mark.parametrize(
    "name", ["efficientvit_mit", "efficientvit_msra", "swiftformer", "bottleneck", "halo"]
)
@torch.no_grad()
def test_a_channel_that_is_made_of_nothing_is_heard_as_nothing(name):
    model, x = build(CASES[name]), image(CASES[name])
    prunable = find_prunable_layers(model)
    (unit,) = (unit for unit in prunable.units(("qk",)) if unit.layer == "layer")
    kept = torch.arange(unit.width)[1:].expand(unit.heads, -1).tolist()
    plan = Plan((UnitPlan("layer", "qk", unit.width, tuple(map(tuple, kept))),))
    kill(model, prunable, plan, ())
    with capturing(model, (unit,), lambda unit, hook, channels: heard.update({hook: channels})):
        heard: dict[str, Tensor] = {}
        model(x)
    for hook in ("query", "key"):
        assert heard[hook].shape[-2:] == (unit.heads, unit.width) or unit.heads == 1
        assert not heard[hook][..., 0].any()
        assert heard[hook][..., 1:].flatten(0, -2).any(0).all()


@pytest.mark.parametrize("name", ["efficientvit_mit", "efficientvit_msra", "parallel diff", "halo"])
@torch.no_grad()
def test_a_slim_layer_is_exported_for_any_batch(name):
    case = CASES[name]
    model, x, more = build(case), image(case), image(case, batch=3)
    cut(model, random_plan(find_prunable_layers(model), 1)[0])
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    assert relative(program.module()(more), model(more)) < 1e-10


MADE_DEAD = ["efficientvit_mit", "efficientvit_msra", "swiftformer", "parallel, biases", "diff"]


@pytest.mark.parametrize("name", MADE_DEAD)
@torch.no_grad()
def test_repaired_or_shrunk_a_cut_is_a_mere_slice(name):
    """Also where channels feed others of the layer, so that it is not enough not to read them."""
    case = CASES[name]
    dense, x = build(case).requires_grad_(False), image(case, batch=6)
    prunable = find_prunable_layers(dense)
    plan = random_plan(prunable, 1)[0]
    moments = calibrate(dense, prunable, x, batch_size=6).moments
    model = copy.deepcopy(dense)
    repair(model, prunable, plan, moments)
    repaired = model(x)
    cut(model, plan)
    assert relative(model(x), repaired) < 1e-8
    for unit in prunable.units():
        model = copy.deepcopy(dense)
        module, seen = model.get_submodule(unit.layer), moments[unit.key]
        (candidate, *_) = find_candidates(module, unit, seen, 1, SearchOptions(basis="channel"))
        width = max(1, unit.width // 2)
        shrink(module, unit, candidate, width, seen, "kept")
        shrunk = model(x)
        cut(model, Plan((candidate.plan(width),)))
        assert relative(model(x), shrunk) < 1e-8


@pytest.mark.parametrize("name", ["parallel, biases", "parallel diff"])
@torch.no_grad()
def test_the_readers_of_a_parallel_block_tell_what_it_adds(name):
    case = CASES[name]
    model, x = build(case), torch.randn(2, 5, 12, dtype=torch.float64)
    unit = next(unit for unit in find_prunable_layers(model).units(("hidden",)) if unit.layer == "layer")
    hook, before = unit.hooks["hidden"], model.layer(x)
    handle = model.layer.get_submodule(hook.module).register_forward_pre_hook(
        lambda module, args: (torch.cat([args[0][..., : hook.offset], args[0][..., hook.offset :] + 1], -1),)
    )
    moved = model.layer(x) - before
    handle.remove()
    assert relative(moved, effective_output_weights(model.layer, unit).sum(1).expand_as(moved)) < 1e-10


@pytest.mark.parametrize("name", ["cpubone, fused", "lowformer, fused", "multi query"])
@torch.no_grad()
def test_repaired_readers_read_what_kept_channels_foretell(name):
    """Of all heads, where they go together; at every place, where a transposed convolution reads."""
    case = CASES[name]
    model, x = build(case).requires_grad_(False), image(case, batch=40)
    prunable = find_prunable_layers(model)
    (unit,) = (unit for unit in prunable.units(("v",)) if unit.layer == "layer")
    kept = tuple(range(0, unit.width, 2))
    plan = Plan((UnitPlan("layer", "v", unit.width, (kept,) * unit.heads),))
    hook, heard = unit.hooks["output"], []
    reader = copy.deepcopy(model.layer.get_submodule(hook.module))
    model.layer.get_submodule(hook.module).register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    seen = calibrate(model, prunable, x, batch_size=40).moments[unit.key].every
    rows, stays = torch.cat(heard).movedim(1, -1), torch.zeros(unit.heads, unit.width, dtype=torch.bool)
    stays[:, kept] = True
    stays = stays.flatten()
    from_kept = rows[..., stays].flatten(0, -2)
    if unit.constants_pass:
        from_kept = torch.cat([from_kept, torch.ones_like(from_kept[:, :1])], dim=1)
    solution = torch.linalg.lstsq(from_kept, rows[..., ~stays].flatten(0, -2), driver="gelsd").solution
    rows[..., ~stays] = (from_kept @ solution).view(*rows.shape[:-1], -1)
    expected = reader(rows.movedim(-1, 1))
    repair(model, prunable, plan, {unit.key: UnitMoments(seen, seen)})  # judged by what was seen: no ridge
    cut(model, plan)
    assert relative(model.layer.get_submodule(hook.module)(rows[..., stays].movedim(-1, 1)), expected) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS.keys())
def test_from_file_to_file(case, tmp_path):
    model = build(case, dtype=torch.float32)
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    result = mhacut.prune(
        tmp_path / "dense.safetensors",
        flops=case.flops,
        model=case.architecture,
        model_args=case.args,
        calibration_images=6,
        img_size=case.side,
        effort="fast",
        round_to=1,
        latency=False,
        output=tmp_path / "slim.safetensors",
    )
    assert 0.98 * result.budget < result.slim.flops <= result.budget < result.dense.flops
    assert all(repair.error <= 1 + 1e-6 for repair in result.repairs.values())
    slim, x = mhacut.load_model(tmp_path / "slim.safetensors"), image(case, dtype=torch.float32)
    assert measure_flops(slim, case.size) == result.slim.flops
    with torch.no_grad():
        logits = slim(x)
    mhacut.save_model(slim, tmp_path / "again.safetensors", like=tmp_path / "slim.safetensors")
    with torch.no_grad():
        assert torch.equal(mhacut.load_model(tmp_path / "again.safetensors")(x), logits)
    exported = torch.export.export(slim, (x,)).module()
    assert relative(exported(x), logits) < 1e-5


@pytest.mark.parametrize(("case", "reasons"), WHOLE.values(), ids=WHOLE.keys())
def test_what_cannot_be_cut_exactly_is_left_whole(case, reasons):
    layer = next(layer for layer in find_prunable_layers(case.create()).layers if layer.name == "layer")
    assert dict(layer.not_prunable) == reasons
    assert not {unit.kind for unit in layer.units} & set(reasons)
