"""A cut model computes what the dense model computes with the removed channels masked."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from helpers.models import build, double, image, relative
from helpers.plans import keep_everything, kill, random_plan
from mhacut.checkpoint.build import allocate
from mhacut.plan import Plan
from mhacut.surgery.channels import rotate
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.mask import masked_tensors, run_with
from mhacut.surgery.slice import cut


@torch.no_grad()
def test_every_unit_matters_and_every_kind_is_cut_or_left_whole_for_a_reason(case):
    # Otherwise the comparisons below would prove nothing.
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
    cut(model, keep_everything(prunable))
    assert relative(model(x), dense) < 1e-12


@torch.no_grad()
def test_a_cut_computes_what_the_masked_model_computes(case):
    """In float64 and float32; with dead channels; in two cuts as in one; with fused and plain attention."""
    whole, x = double(case)
    prunable = find_prunable_layers(whole)
    for seed in (0,) if case.fast else (1, 0):
        plan, scales = random_plan(prunable, seed)
        masked = run_with(whole, masked_tensors(whole, prunable, scales), x)
        slim = copy.deepcopy(whole)
        cut(slim, plan, scales)
        assert relative(slim(x), masked) < 1e-9

        dead, unscaled = copy.deepcopy(whole), copy.deepcopy(whole)
        expected = run_with(dead, kill(dead, prunable, plan, case.revived), x)
        cut(dead, plan)
        assert relative(dead(x), expected) < 1e-9

        cut(unscaled, plan)
        second, _ = random_plan(find_prunable_layers(unscaled), seed + 1)
        cut(unscaled, second)
        at_once = copy.deepcopy(whole)
        cut(at_once, Plan.from_json(second.after(plan).to_json()))
        assert shapes(unscaled) == shapes(at_once)
        assert relative(unscaled(x), at_once(x)) < 1e-9
    assert_as_exact_in_single_precision(case, masked)
    assert_fused_equals_plain(slim, case)


def assert_as_exact_in_single_precision(case, exact: Tensor) -> None:
    """A deep model of random weights may take rounding to 1e-4, masked or sliced."""
    model, x = build(case).requires_grad_(False), image(case)
    prunable = find_prunable_layers(model)
    plan, scales = random_plan(prunable, 0)
    masked = run_with(model, masked_tensors(model, prunable, scales), x)
    cut(model, plan, scales)
    sliced_error, masked_error = (relative(found.double(), exact) for found in (model(x), masked))
    assert sliced_error < max(1e-4, 2 * masked_error)


def assert_fused_equals_plain(slim: nn.Module, case) -> None:
    for batch in (1, 3):
        x, outputs = image(case, batch=batch, dtype=torch.float64), []
        for fused in (True, False):
            for module in slim.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = fused
            outputs.append(slim(x))
        assert relative(*outputs) < 1e-12


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@torch.no_grad()
def test_a_cut_needs_no_weights_and_allows_another_basis(case):
    """A model on the meta device is cut alike. Rotated channels compute the same, before a cut and after."""
    model, x = double(case)
    names, outline = list(model.state_dict()), copy.deepcopy(model).to("meta")
    for seed in (None, 4):
        if seed is not None:
            plan = random_plan(find_prunable_layers(model), seed)[0]
            cut(model, plan)
            cut(outline, plan)
        generator, expected = torch.Generator().manual_seed(2), model(x)
        for unit in find_prunable_layers(model).units():
            if unit.mixing == "rotate":
                shape = unit.heads, unit.width, unit.width
                mixing = torch.randn(shape, generator=generator, dtype=torch.float64)
                mixing = mixing[:1].expand(shape) if unit.sharing == "tied" else mixing
                rotate(model.get_submodule(unit.layer), unit, mixing + 3 * torch.eye(unit.width))
        assert relative(model(x), expected) < 1e-9
    assert list(model.state_dict()) == names
    assert shapes(outline) == shapes(model)
    allocate(outline)
    outline.load_state_dict(model.state_dict())
    assert relative(outline(x), model(x)) < 1e-12
