from __future__ import annotations

import re
from collections import OrderedDict
from itertools import combinations_with_replacement

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import GluMlp
from timm.models.efficientvit_mit import LiteMLA
from torch import nn
from torch.nn import functional as F

from helpers.plans import random_plan
from mhacut.errors import UnsupportedModelError
from mhacut.plan import Plan, UnitPlan
from mhacut.surgery.costs import build_cost_table, fit_polynomial
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.hooks import cost_key
from mhacut.surgery.slice import cut


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "giga"),
    [("deit_tiny_patch16_224", 1.26), ("deit_small_patch16_224", 4.61), ("deit_base_patch16_224", 17.58)],
)
def test_the_published_numbers(architecture, giga):
    # Every block costs the same, so two small models tell what twelve blocks cost.
    totals = []
    for depth in (1, 2):
        model = timm.create_model(architecture, depth=depth).eval()
        totals.append(measure_flops(model, (3, 224, 224)))
    assert round((totals[0] + 11 * (totals[1] - totals[0])) / 1e9, 2) == giga


def test_the_table_is_differentiable_in_the_widths():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).eval()
    table = build_cost_table(model, find_prunable_layers(model), (3, 32, 32))
    width = torch.tensor(64.0, requires_grad=True)
    key = ("blocks.0.attn", "v")
    table.flops({key: width}).backward()
    assert float(width.grad) == table.flops({key: 64}) - table.flops({key: 63})


@pytest.mark.slow
def test_a_layer_that_runs_three_times_costs_as_often():
    # The parallel blocks of CoaT share one MLP among three resolutions.
    args = {"img_size": 64, "parallel_depth": 1, "serial_depths": (1, 1, 1, 1)}
    model = timm.create_model("coat_mini", **args).eval()
    prunable = find_prunable_layers(model)
    table = build_cost_table(model, prunable, (3, 64, 64))
    (shared,) = (cost for cost in table.layers if cost.layer.name == "parallel_blocks.0.mlp2")
    assert len(shared.runs) == 3
    (unit,) = shared.layer.units
    plan = Plan((UnitPlan(unit.layer, unit.kind, unit.width, (tuple(range(unit.width // 2)),)),))
    cut(model, plan)
    assert table.flops(plan.widths()) == measure_flops(model, (3, 64, 64))


@given(data=st.data())
def test_a_polynomial_of_degree_2_is_found_from_few_counts(data):
    kinds = ("qk", "v", "hidden")[: data.draw(st.integers(1, 3))]
    coefficients, whole = st.integers(0, 10**9), {kind: data.draw(st.integers(1, 300)) for kind in kinds}
    linear = {kind: data.draw(coefficients) for kind in kinds}
    pairs = {pair: data.draw(coefficients) for pair in combinations_with_replacement(kinds, 2)}
    asked = set()

    def count(changed):
        asked.add(tuple(sorted(changed.items())))
        w = {**whole, **changed}
        assert min(w.values()) >= 1
        total = 7 + sum(each * w[kind] for kind, each in linear.items())
        return total + sum(each * w[a] * w[b] for (a, b), each in pairs.items())

    found = fit_polynomial("attn", whole, count)
    assert len(asked) <= {1: 4, 2: 7, 3: 11}[len(kinds)]
    for _ in range(5):
        widths = {kind: data.draw(st.integers(1, whole[kind])) for kind in kinds}
        assert found.at(widths) - found.at(whole) == count(widths) - count({})


@pytest.mark.parametrize("cost", [lambda w: w**3, lambda w: w * (w + 1) // 2, lambda w: 64 * (w // 8)])
def test_costs_that_are_no_such_polynomial_are_an_error(cost):
    with pytest.raises(
        UnsupportedModelError, match=r"^attn \(Odd\): .* not a quadratic polynomial .*hidden \d+ of 64"
    ):
        fit_polynomial("attn (Odd)", {"hidden": 64}, lambda changed: cost(changed.get("hidden", 64)))


@pytest.mark.parametrize("width", [5, 6, 7, 16, 33, 64])
def test_no_width_is_checked_at_one_of_those_that_were_counted(width):
    """A cubic that is interpolated in three places is met in these three only."""
    with pytest.raises(UnsupportedModelError, match="are not a quadratic polynomial"):
        fit_polynomial("attn", {"hidden": width}, lambda changed: changed.get("hidden", width) ** 3)


@pytest.mark.parametrize(
    "other",
    [{"img_size": 48}, {"num_heads": 6}, {"embed_dim": 96}, {"qk_norm": True}, {"mlp_layer": GluMlp}],
    ids=str,
)
def test_layers_that_differ_are_counted_each(other):
    """By their cost, and whichever model came first."""
    for args in ({}, other):
        model = timm.create_model("vit_tiny_patch16_224", **{"depth": 1, "img_size": 32, **args}).eval()
        prunable = find_prunable_layers(model)
        size = (3, args.get("img_size", 32), args.get("img_size", 32))
        table = build_cost_table(model, prunable, size)
        plan, _ = random_plan(prunable, seed=0)
        cut(model, plan)
        assert table.flops(plan.widths()) == measure_flops(model, size)


def test_layers_with_other_functions_differ():
    class Activated(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

    one, same, other = (Activated(function) for function in (F.relu, F.relu, F.silu))
    assert cost_key(one) == cost_key(same) != cost_key(other)


def test_an_operator_nobody_counts_is_an_error_not_a_zero():
    class Sorts(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return (x * self.scale).sort(-1).values

    with pytest.raises(UnsupportedModelError, match="aten::sort"):
        measure_flops(Sorts().eval(), (3, 4, 4))


def test_layers_of_any_widths_run_without_weights():
    # There is no autocast for the meta device, where timm's own class does without.
    with torch.device("meta"):
        model = nn.Sequential(OrderedDict(attn=LiteMLA(12, 12, dim=4)))
    heads = find_prunable_layers(model).unit(("attn", "qk")).heads
    cut(model, Plan((UnitPlan("attn", "qk", 4, ((0, 1),) * heads),)))
    assert type(model.attn) is not LiteMLA
    assert model(torch.zeros(1, 12, 4, 4, device="meta")).shape == (1, 12, 4, 4)


class Contracts(nn.Module):
    def __init__(self, equation):
        super().__init__()
        self.matrix, self.equation = nn.Parameter(torch.ones(4, 5)), equation

    def forward(self, x):
        return torch.einsum(self.equation, x, *[self.matrix] * self.equation.count(","))


@pytest.mark.parametrize("equation", ["bchw,wd->bchd", "...w,wd->...d", "b...w,wd->bd...", "bchw,wd->dw"])
def test_a_contraction_costs_the_product_of_its_indices(equation):
    assert measure_flops(Contracts(equation).eval(), (2, 3, 4)) == 1 * 2 * 3 * 4 * 5


@pytest.mark.parametrize("equation", ["bchw,wd,wd->bchd", "bchw,wd"])
def test_contractions_that_cannot_be_counted_are_an_error_too(equation):
    with pytest.raises(UnsupportedModelError, match=re.escape(repr(equation))):
        measure_flops(Contracts(equation).eval(), (2, 3, 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "args", "size"),
    [
        ("vit_tiny_r_s16_p8_224", {"depth": 1, "img_size": 64}, 64),
        ("vit_small_resnet26d_224", {"depth": 1, "img_size": 64}, 64),
        ("vit_tiny_patch16_224", {"depth": 1, "img_size": 32, "global_pool": "avgmax"}, 32),
    ],
)
def test_stems_and_resampled_positions_can_be_counted(architecture, args, size):
    model = timm.create_model(architecture, **args).eval()
    table = build_cost_table(model, find_prunable_layers(model), (3, size, size))
    assert 0 < sum(table.by_layer().values()) < table.dense
