"""Plans that any property must hold for, and properties that every class is held to alike."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from helpers.models import relative
from mhacut.checkpoint.build import allocate
from mhacut.options.prune import SearchOptions
from mhacut.plan import Plan, UnitPlan
from mhacut.pruning.distill import Distillation
from mhacut.surgery.costs import build_cost_table
from mhacut.surgery.find import PrunableLayers, find_prunable_layers
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.mask import masked_tensors, run_with
from mhacut.surgery.rotate import rotate
from mhacut.surgery.slice import cut


def random_plan(prunable: PrunableLayers, seed: int) -> tuple[Plan, dict]:
    """Any widths; any channels, each head its own, in shared units by a coin; and scales on what is kept."""
    generator = torch.Generator().manual_seed(seed)
    units, channel_scales = [], {}
    for unit in prunable.units():
        width = int(torch.randint(1, unit.width + 1, (), generator=generator))
        rows = [
            torch.randperm(unit.width, generator=generator)[:width].sort().values for _ in range(unit.heads)
        ]
        own = unit.sharing == "own" or (
            unit.sharing == "copied" and bool(torch.randint(2, (), generator=generator))
        )
        kept = torch.stack(rows if own else rows[:1] * unit.heads)
        chosen = tuple(map(tuple, kept.tolist()))
        units.append(
            UnitPlan(unit.layer, unit.kind, unit.width, chosen, unshared=own and unit.sharing == "copied")
        )
        channel_scale = torch.zeros(unit.heads, unit.width, dtype=torch.float64)
        channel_scales[unit.key] = channel_scale.scatter(
            1, kept, 0.5 + torch.rand(kept.shape, generator=generator).double()
        )
    return Plan(tuple(units)), channel_scales


def keep_everything(prunable: PrunableLayers) -> Plan:
    return Plan(tuple(UnitPlan.keep_all(u.layer, u.kind, u.heads, u.width) for u in prunable.units()))


@torch.no_grad()
def difference_of_nothing_cut(model: nn.Module, x: Tensor) -> float:
    """Between a model and itself, cut by a plan that keeps everything."""
    expected = model(x)
    cut(model, keep_everything(find_prunable_layers(model)))
    return relative(model(x), expected)


@torch.no_grad()
def difference_of_mask_and_cut(model: nn.Module, x: Tensor, seed: int) -> float:
    """Between channels that count nothing and channels that are gone, the others weighed by scales."""
    prunable = find_prunable_layers(model)
    plan, channel_scales = random_plan(prunable, seed)
    masked = run_with(model, masked_tensors(model, prunable, channel_scales), x)
    slim = copy.deepcopy(model)
    cut(slim, plan, channel_scales)
    return relative(slim(x), masked)


@torch.no_grad()
def difference_of_turned_channels(model: nn.Module, x: Tensor) -> float:
    """Between a model and itself, the channels of every unit that allows it in another basis."""
    generator, expected = torch.Generator().manual_seed(2), model(x)
    for unit in find_prunable_layers(model).units():
        if unit.mixing == "rotate":
            shape = unit.heads, unit.width, unit.width
            mixing = torch.randn(shape, generator=generator, dtype=torch.float64)
            mixing = mixing[:1].expand(shape) if unit.sharing == "tied" else mixing
            rotate(model.get_submodule(unit.layer), unit, mixing + 3 * torch.eye(unit.width))
    return relative(model(x), expected)


def assert_costs_are_what_fvcore_counts(model: nn.Module, size: tuple[int, int, int], seed: int) -> None:
    """Of the model, and of its cut by a random plan, before that is made."""
    prunable = find_prunable_layers(model)
    table = build_cost_table(model, prunable, size)
    plan, _ = random_plan(prunable, seed)
    slim = copy.deepcopy(model)
    cut(slim, plan)
    assert table.flops(plan.widths()) == measure_flops(slim, size)
    assert table.flops({}) == table.dense == measure_flops(model, size)


@torch.no_grad()
def assert_cut_by_name_and_shape(model: nn.Module, x: Tensor, seed: int) -> None:
    """A cut renames no tensor, and needs no data: the weights can be filled in afterwards."""
    before, outline = list(model.state_dict()), copy.deepcopy(model).to("meta")
    plan, _ = random_plan(find_prunable_layers(model), seed)
    cut(outline, plan)
    cut(model, plan)
    assert list(model.state_dict()) == before
    assert shapes(outline) == shapes(model)
    allocate(outline)
    outline.load_state_dict(model.state_dict())
    assert torch.equal(outline(x), model(x))


def untrained(model: nn.Module, x: Tensor) -> set[str]:
    """Parameters that no finite gradient reaches in training mode; timm's models have some."""
    model.train()
    model(x).square().sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}


def difference_of_kernels(model: nn.Module, x: Tensor) -> float:
    """Between attention that is fused and attention that is not."""
    outputs = []
    for fused in (True, False):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        outputs.append(model(x))
    return relative(*outputs)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def difference_of_two_cuts_and_one(model: nn.Module, x: Tensor, seed: int) -> float:
    """Between a model that is cut twice and one cut at once, as a file tells it; their shapes must agree."""
    dense = copy.deepcopy(model)
    first, _ = random_plan(find_prunable_layers(model), seed)
    cut(model, first)
    second, _ = random_plan(find_prunable_layers(model), seed + 1)
    cut(model, second)
    cut(dense, Plan.from_json(second.after(first).to_json()))
    assert shapes(model) == shapes(dense)
    return relative(model(x), dense(x))


def distillation_of(model: nn.Module, images: Tensor, batch_size: int = 8) -> Distillation:
    """Distillation with ``model`` as the teacher."""
    options = SearchOptions(batch_size=batch_size, seed=0)
    return Distillation(images, model(images), None, options, classifier=True)
