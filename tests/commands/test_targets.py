"""Budgets of several kinds: what they allow, what is stored, and refusals."""

from __future__ import annotations

import copy
import random
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import mhacut
from helpers.cli import FAST, document_of, run
from helpers.files import SLIM
from helpers.models import ModelCase, build, slow_except
from helpers.plans import random_plan
from helpers.pruning import last_step, prune_quickly
from mhacut.commands.prune_names import options_of_each
from mhacut.errors import BudgetError, MhacutError, UsageError
from mhacut.options.prune import PruneOptions
from mhacut.plan import Plan, UnitPlan
from mhacut.pruning import allocate
from mhacut.pruning.allocate import TIE, cheapest_widths
from mhacut.pruning.limits import Limit, keeps
from mhacut.surgery.costs import count_bytes, storage_cost
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.flops import count_parameters
from mhacut.surgery.slice import cut
from properties.cases import CASES
from pruning.test_allocation import Problem

# --- names and contradictions ---


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"flops": "50%", "params": "60%", "size": "6MB"}, "vit-50pct-params60pct-size6MB"),
        ({"flops": 2e9, "max_latency": "12ms"}, "vit-2000000000.0-latency12ms"),
        ({"max_kl": 0.1}, "vit-kl0.1"),
    ],
)
def test_default_names_state_what_is_bounded(given, name):
    (own,) = options_of_each(PruneOptions.of(checkpoint="vit.pth", **given), "vit")
    assert own.output == f"{name}.safetensors"


PAPER = {"allocation": "indicator", "selection": "indicator", "basis": "principal"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "flops is missing"),
        ({"flops": ()}, "flops is missing"),
        ({"flops": "50%", "max_kl": 0.1}, "max_kl=0.1 and flops='50%' cannot be combined"),
        ({"params": "50%", "max_drop": 1.0}, "max_drop=1.0 and params='50%' cannot be combined"),
        ({"max_kl": 0.0}, "max_kl=0.0: expected above 0"),
        ({"params": "50%", "allocation": "indicator"}, "allocation='indicator': expected curves or uniform"),
        ({"size": "6MB", "scope": "attention+mlp+tokens"}, "Add flops, max_latency, max_kl or max_drop"),
        ({"flops": "50%", **PAPER}, "basis='principal': expected channel or auto with selection='indicator'"),
        ({"max_latency": "50%", "max_kl": 0.1}, "max_kl=0.1 and max_latency='50%' cannot be combined"),
        ({"max_latency": "50%", "allocation": "indicator"}, "allocation='indicator': expected curves or"),
        ({"max_latency": "50%", "int8": True}, "int8=True: expected runtime='onnx'"),
        ({"max_latency": "50%", "runtime": "tensorrt"}, "runtime='tensorrt': expected one of eager,"),
        ({"max_latency": "50%", "threads": 0}, "threads=0: expected at least 1"),
    ],
)
def test_contradictory_targets_are_refused(given, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        PruneOptions.of(checkpoint="a", **given)


# --- allocation ---


def limited(data, costs):
    """A problem, and limits on several costs, linear in the widths."""
    problem = Problem.draw(data, fixed=0)
    limits = []
    for _ in range(costs):
        price = {key: data.draw(st.integers(1, 9)) for key in problem.keys}
        # What does not shrink is so large that any plan uses nearly all of the budget.
        cost = Problem(problem.keys, problem.choices, problem.curves, price, fixed=10**5)
        limits.append(Limit(cost.flops, cost.budget(data)))
    return problem, limits


@pytest.mark.parametrize("costs", [1, 2, 3, 4])
@given(data=st.data())
def test_several_budgets_are_all_met_at_most_a_step_for_each_from_the_best_plan(costs, data):
    problem, limits = limited(data, costs)
    found = cheapest_widths(problem.curves, problem.choices, limits)
    assert keeps(limits, found)
    best = min(problem.error(plan) for plan in problem.every() if keeps(limits, plan))
    assert problem.error(found) <= (1 + TIE) * (best + costs * problem.dearest_step()) + 1e-9


def test_ratios_of_multipliers_are_searched(monkeypatch):
    """Units that are dear in one budget are cheap in the other, and neither budget alone says what to cut."""
    generator = random.Random(0)
    keys, widths = [(f"layer{number}", "hidden") for number in range(8)], range(1, 25)
    choices = {key: tuple(widths) for key in keys}
    scales = {key: generator.uniform(0.1, 9) for key in keys}
    curves = {key: {width: scale * (1 / width - 1 / 24) for width in widths} for key, scale in scales.items()}
    one = {key: generator.randint(1, 20) for key in keys}
    prices = [one, {key: 21 - price for key, price in one.items()}]

    def limit(price):
        return Limit(
            lambda plan: 10**5 + sum(price[key] * plan[key] for key in keys), 10**5 + 4 * sum(price.values())
        )

    limits = [limit(price) for price in prices]
    searched = cheapest_widths(curves, choices, limits, close_gap=False)
    monkeypatch.setitem(allocate._RATIOS, 2, 1)
    alone = cheapest_widths(curves, choices, limits, close_gap=False)
    assert keeps(limits, searched)
    errors = [sum(curves[key][plan[key]] for key in keys) for plan in (searched, alone)]
    assert errors[0] < 0.97 * errors[1]


@given(data=st.data())
def test_a_budget_that_does_not_bind_changes_nothing(data):
    problem, limits = limited(data, 1)
    slack = Limit(lambda widths: sum(widths.values()), 10**6)
    alone = cheapest_widths(problem.curves, problem.choices, limits)
    assert cheapest_widths(problem.curves, problem.choices, [*limits, slack]) == alone
    assert cheapest_widths(problem.curves, problem.choices, [slack, *limits]) == alone


# --- what is stored ---


PVT = ModelCase("pvt_v2_b0", {"depths": (1, 1, 1, 1)})


@pytest.mark.parametrize("case", [*SLIM.values(), PVT], ids=lambda case: case.architecture)
@pytest.mark.parametrize("seed", slow_except([0], [0, 1]))
def test_storage_follows_from_widths(case, seed):
    torch.manual_seed(0)
    model = build(case)
    prunable = find_prunable_layers(model)
    least = {unit.key: 1 for unit in prunable.units()}
    dtypes = {name: torch.float16 for name, tensor in model.state_dict().items() if "proj" in name}
    costs = (
        (storage_cost(model, prunable, least, None, copies=True), count_parameters),
        (storage_cost(model, prunable, least, dtypes, copies=True), lambda part: count_bytes(part, dtypes)),
    )
    plan, _ = random_plan(prunable, seed=seed)
    slim = copy.deepcopy(model)
    cut(slim, plan)
    for cost, count in costs:
        expected, found = cost(plan.widths()), count(slim)
        # What heads, or layers of CoaT, share until they are cut is counted as if it were cut.
        shared = "coat" in case.architecture or any(unit.sharing != "own" for unit in prunable.units())
        assert found <= expected if shared else found == expected


@pytest.mark.parametrize("kinds", [["qk"], ["v"], ["qk", "v"]])
@pytest.mark.parametrize("gone", [(1, 1), (2, 1), (1, 2)])
def test_storage_that_is_no_polynomial_is_counted(kinds, gone):
    # A weight of LiteMLA has room for the wider of q/k and v.
    model = build(CASES["efficientvit_mit.LiteMLA"])
    prunable = find_prunable_layers(model)
    units = prunable.units(kinds)
    cost = storage_cost(model, prunable, {unit.key: 1 for unit in units}, None, copies=True)
    widths = {unit.key: unit.width - less for unit, less in zip(units, gone, strict=False)}
    kept = {unit.key: (tuple(range(widths[unit.key])),) * unit.heads for unit in units}
    cut(model, Plan(tuple(UnitPlan(*unit.key, unit.width, kept[unit.key]) for unit in units)))
    assert cost(widths) == count_parameters(model)


# --- from file to file ---


@pytest.mark.parametrize(
    "targets",
    [
        {"params": "60%"},
        {"params": 40_000},
        {"size": "65%"},
        {"size": "250KB", "round_to": 4},
        {"flops": "60%", "params": "60%"},
        {"flops": "80%", "params": "55%", "size": "300KB"},
    ],
)
def test_all_targets_are_met_and_used(tiny_vit, tmp_path, targets):
    result = prune_quickly(tiny_vit, tmp_path / "slim.safetensors", **targets)
    model = mhacut.load_model(result.output)
    size = result.output.stat().st_size
    assert count_parameters(model) == result.slim.parameters
    assert size <= result.slim.size <= size + 64
    reached = {target.name: target for target in result.targets}
    assert set(reached) == targets.keys() - {"round_to"}
    found = {"flops": result.slim.flops, "params": result.slim.parameters, "size": result.slim.size}
    for name, target in reached.items():
        assert target.spec == str(targets[name])
        assert target.reached == found[name] <= target.limit
    # A step of a width is a few per cent of so small a model; some budget is nearly used up.
    assert max(target.reached / target.limit for target in result.targets) > 0.93
    assert size <= reached["size"].limit if "size" in reached else True
    entry = last_step(result.output)
    assert {name: entry["options"][name] for name in reached} == {
        name: target.spec for name, target in reached.items()
    }
    assert [target["target"] for target in entry["targets"]] == list(reached)


def test_a_file_of_half_precision_is_measured_as_it_is_written(tiny_vit, tmp_path):
    half = tmp_path / "half.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(tiny_vit.path).items()}, half)
    dense = sum(tensor.nbytes for tensor in load_file(half).values())
    result = prune_quickly(tiny_vit, tmp_path / "slim.safetensors", checkpoint=half, size="90%")
    (target,) = result.targets
    # The job's model has other tensors where it computes the class token alone; none of them is dense.
    assert (result.dense.size, target.limit) == (dense, int(0.9 * dense))
    assert 0.9 * target.limit <= result.output.stat().st_size <= target.limit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": "1%"}, r"params='1%' is out of reach: the lowest is \S+ \(\d+\.\d% of 67\.\dK\)"),
        ({"size": "10KB"}, r"size='10KB' is out of reach: the lowest is \S+KB"),
        ({"params": "100%"}, r"nothing to prune: the model's \S+K parameters are already within 100%"),
        ({"flops": "60%", "size": "1KB"}, "size='1KB' is out of reach"),
        ({"flops": "100%", "size": "100%"}, r"nothing to prune: .* are already within 100% and \S+KB are"),
        ({"max_drop": 1.0}, r"max_drop=1\.0: expected labelled images to measure accuracy on"),
        ({"flops": "1%"}, r"out of reach: the lowest is .*round_to=8"),
        ({"flops": "50%", "scope": "attention"}, "out of reach.*scope='attention' "),
        ({"flops": "60%", "device": "tpu9"}, "not a device"),
        ({"flops": "60%", "model": "swin_tiny_patch4_window7_224", "model_args": {}}, "swin_tiny"),
    ],
)
def test_infeasible_targets_are_refused_with_the_nearest(tiny_vit, tmp_path, options, message):
    with pytest.raises(MhacutError, match=message):
        prune_quickly(tiny_vit, tmp_path / "slim.safetensors", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["params", "size"])
def test_the_lowest_target_that_is_named_works(tiny_vit, tmp_path, name):
    with pytest.raises(BudgetError) as refusal:
        prune_quickly(tiny_vit, tmp_path / "slim.safetensors", **{name: "1%"})
    for budget in re.search(r"the lowest is (\S+) \((\S+%) of", str(refusal.value)).groups():
        result = prune_quickly(tiny_vit, tmp_path / "slim.safetensors", **{name: budget}, dry_run=True)
        assert result.targets[0].reached <= result.targets[0].limit


@pytest.mark.slow
def test_targets_are_printed(tiny_vit, tmp_path):
    out = tmp_path / "slim.safetensors"
    arguments = ["--flops", "70%", "--params", "60%", "--size", "200KB", "-o", out, *FAST]
    document = document_of("prune", *tiny_vit.flags, *arguments)
    assert [target["target"] for target in document["targets"]] == ["flops", "params", "size"]
    assert document["slim"]["size"] >= out.stat().st_size
    result = run("prune", *tiny_vit.flags, *arguments, "--overwrite")
    assert re.search(r"^--params 60%: \S+K of at most \S+K parameters$", result.stdout, re.MULTILINE)
    assert re.search(r"^--size 200KB: \S+KB of at most 200KB$", result.stdout, re.MULTILINE)
