"""A cut computes what the same model computes with the removed channels masked."""

from __future__ import annotations

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.models import build, double, image, relative
from helpers.plans import keep_everything, kill, random_plan
from mhacut.checkpoint.build import allocate
from mhacut.plan import Plan
from mhacut.surgery.channels import rotate
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.mask import masked_tensors, run_with
from mhacut.surgery.slice import cut

few = settings(max_examples=2, deadline=None)
seeds = st.integers(0, 2**32 - 1)


@torch.no_grad()
def test_keeping_everything_changes_nothing(case):
    model, x = double(case)
    expected = model(x)
    cut(model, keep_everything(find_prunable_layers(model)))
    assert relative(model(x), expected) < 1e-12


@torch.no_grad()
def test_every_unit_matters_and_every_kind_is_cut_or_left_whole_for_a_reason(case):
    # Otherwise the comparisons here would prove nothing.
    model, x = double(case)
    prunable, dense = find_prunable_layers(model), model(x)
    reasons = {kind: reason for layer in prunable.layers for kind, reason in layer.not_prunable.items()}
    assert reasons == case.whole
    for layer in prunable.layers:
        kinds = {unit.kind for unit in layer.units} | set(layer.not_prunable) | set(layer.coupled_with)
        assert kinds
        assert kinds <= ({"qk", "v", "hidden"} if layer.adapter.family == "attention" else {"hidden"})
    for unit in prunable.units():
        gone = torch.zeros(unit.heads, unit.width, dtype=torch.float64)
        if unit.linear:
            gone[:, 0] = 1.0  # without any features there would be no attention
        if not gone.all():
            masked = run_with(model, masked_tensors(model, prunable, {unit.key: gone}), x)
            assert relative(masked, dense) > 1e-6


def masked_and_sliced(model: nn.Module, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Outputs where channels count nothing, and where they are gone; the others are weighed by scales."""
    prunable = find_prunable_layers(model)
    plan, channel_scales = random_plan(prunable, seed)
    masked = run_with(model, masked_tensors(model, prunable, channel_scales), x)
    cut(model, plan, channel_scales)
    return masked, model(x)


@few
@given(seed=seeds)
@torch.no_grad()
def test_masked_equals_sliced(case, seed):
    masked, sliced = masked_and_sliced(*double(case), seed)
    assert relative(sliced, masked) < 1e-9


@torch.no_grad()
def test_sliced_is_as_exact_as_masked_in_single_precision(case):
    """A deep model of random weights may take rounding to 1e-4, masked or sliced."""
    exact, _ = masked_and_sliced(*double(case), seed=0)
    masked, sliced = (
        relative(found.double(), exact) for found in masked_and_sliced(build(case), image(case), 0)
    )
    assert sliced < max(1e-4, 2 * masked)


@few
@given(seed=seeds)
@torch.no_grad()
def test_removing_dead_channels_changes_nothing(case, seed):
    model, x = double(case)
    prunable = find_prunable_layers(model)
    plan, _ = random_plan(prunable, seed)
    expected = run_with(model, kill(model, prunable, plan, case.revived), x)
    cut(model, plan)
    assert relative(model(x), expected) < 1e-9


@few
@given(seed=seeds)
@torch.no_grad()
def test_a_slim_model_can_be_cut_again(case, seed):
    """By two cuts as by one that a file describes."""
    model, x = double(case)
    dense = copy.deepcopy(model)
    first, _ = random_plan(find_prunable_layers(model), seed)
    cut(model, first)
    second, _ = random_plan(find_prunable_layers(model), seed + 1)
    cut(model, second)
    cut(dense, Plan.from_json(second.after(first).to_json()))
    assert shapes(model) == shapes(dense)
    assert relative(model(x), dense(x)) < 1e-9


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@torch.no_grad()
def test_a_cut_renames_no_tensor_and_needs_no_data(case):
    """The weights can be filled in afterwards."""
    model, x = build(case), image(case)
    before, outline = list(model.state_dict()), copy.deepcopy(model).to("meta")
    plan, _ = random_plan(find_prunable_layers(model), seed=6)
    cut(outline, plan)
    cut(model, plan)
    assert list(model.state_dict()) == before
    assert shapes(outline) == shapes(model)
    allocate(outline)
    outline.load_state_dict(model.state_dict())
    assert torch.equal(outline(x), model(x))


@torch.no_grad()
def test_turned_channels_compute_what_they_did(case):
    """The channels of every unit that allows it in another basis, in the dense model and in a slim one."""
    model, x = double(case)
    for seed in (None, 4):
        if seed is not None:
            cut(model, random_plan(find_prunable_layers(model), seed)[0])
        generator, expected = torch.Generator().manual_seed(2), model(x)
        for unit in find_prunable_layers(model).units():
            if unit.mixing == "rotate":
                shape = unit.heads, unit.width, unit.width
                mixing = torch.randn(shape, generator=generator, dtype=torch.float64)
                mixing = mixing[:1].expand(shape) if unit.sharing == "tied" else mixing
                rotate(model.get_submodule(unit.layer), unit, mixing + 3 * torch.eye(unit.width))
        assert relative(model(x), expected) < 1e-9


@torch.no_grad()
def test_fused_and_plain_attention_agree_at_any_batch(case):
    model, _ = double(case)
    cut(model, *random_plan(find_prunable_layers(model), seed=2))
    for batch in (1, 3):
        x, outputs = image(case, batch=batch, dtype=torch.float64), []
        for fused in (True, False):
            for module in model.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = fused
            outputs.append(model(x))
        assert relative(*outputs) < 1e-12
