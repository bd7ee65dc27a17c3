"""Repair of whole models: what it keeps, and its promises."""

from __future__ import annotations

import torch

from helpers.models import build, image, relative
from mhacut.linalg.reconstruction import refit_logits
from mhacut.plan import Plan, UnitPlan
from mhacut.pruning.calibrate import calibrate
from mhacut.pruning.repair import repair
from mhacut.surgery.channels import channels_of
from mhacut.surgery.find import find_prunable_layers
from properties.cases import VITS


def moments_of(model, prunable, images):
    return calibrate(model, prunable, images, batch_size=4).moments


def plan_of(prunable, seed, share=0.6):
    generator = torch.Generator().manual_seed(seed)
    units = []
    for unit in prunable.units():
        width = max(1, int(share * unit.width))
        kept = [
            torch.randperm(unit.width, generator=generator)[:width].sort().values.tolist()
            for _ in range(unit.heads)
        ]
        units.append(UnitPlan(unit.layer, unit.kind, unit.width, tuple(map(tuple, kept))))
    return Plan(tuple(units))


def test_the_mixing_of_the_logits_is_folded_into_the_queries_as_it_was_solved():
    """Logits of the refitted layer are q_S C k_S^T, C the best mixing, which is not symmetric."""
    model = build(VITS["plain"], dtype=torch.float64).requires_grad_(False)
    prunable = find_prunable_layers(model)
    unit = next(unit for unit in prunable.units() if unit.kind == "qk")
    module = model.get_submodule(unit.layer)
    before = [channels_of(module, unit, axis).double() for axis in unit.scale_axes]
    seen = moments_of(model, prunable, image(VITS["plain"], batch=8, dtype=torch.float64))[unit.key]
    plan = Plan((next(each for each in plan_of(prunable, 0) if each.kind == "qk"),))
    repair(model, prunable, plan, {unit.key: seen})
    kept = torch.tensor(plan.units[0].kept)
    mixing = refit_logits(seen.fit, seen.held, kept, plain=1.0).matrix
    assert relative(mixing, mixing.mT) > 0.01
    for axis, rows in zip(unit.scale_axes, before, strict=True):
        after = channels_of(module, unit, axis).double()
        for head, channels in enumerate(kept):
            # Rows of the weights are channels of q = x W^T: (q_S C)^T is C^T times them.
            expected = torch.zeros_like(rows[head])
            expected[channels] = torch.einsum("ji,j...->i...", mixing[head], rows[head, channels])
            assert relative(after[head], expected) < 1e-9


def test_units_that_keep_everything_are_not_touched():
    model = build(VITS["plain"]).requires_grad_(False)
    prunable = find_prunable_layers(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = Plan(tuple(u.keep_first(u.width) for u in prunable.units()))
    assert repair(model, prunable, whole, moments_of(model, prunable, image(VITS["plain"]))) == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
