"""The FLOPs that a plan is promised to cost are those of the slim model."""

from __future__ import annotations

from helpers.models import build
from helpers.plans import random_plan
from mhacut.surgery.costs import build_cost_table
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.slice import cut


def test_the_cost_table_is_what_fvcore_counts(case):
    model = build(case)
    prunable = find_prunable_layers(model)
    table = build_cost_table(model, prunable, case.size)
    assert table.flops({}) == table.dense == measure_flops(model, case.size)
    plan, _ = random_plan(prunable, seed=0)
    cut(model, plan)
    assert table.flops(plan.widths()) == measure_flops(model, case.size)
