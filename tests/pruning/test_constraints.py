"""Constraints on widths: what they leave, what they cost, and how they are refused."""

from __future__ import annotations

import re
from functools import partial

import pytest

import mhacut
from helpers.pruning import prune_quickly
from mhacut.errors import UsageError
from mhacut.pruning.allocate import cheapest_widths
from mhacut.pruning.limits import Constraints, Limit

prune = partial(prune_quickly, flops="60%")
CHOICES = {
    ("blocks.0.attn", "qk"): (8, 16, 24),
    ("blocks.0.attn", "v"): (8, 16, 24),
    ("blocks.0.mlp", "hidden"): (8, 16, 24, 32),
    ("blocks.1.attn", "v"): (8, 16),
}


@pytest.mark.parametrize(
    ("constraints", "expected"),
    [
        (Constraints(exclude=("blocks.0.*",)), [(24,), (24,), (32,), (8, 16)]),
        (Constraints(exclude=("*.attn.qk",)), [(24,), (8, 16, 24), (8, 16, 24, 32), (8, 16)]),
        (Constraints(exclude=("*.mlp", "blocks.1.attn")), [(8, 16, 24), (8, 16, 24), (32,), (16,)]),
        (Constraints(min_width=("*=16",)), [(16, 24), (16, 24), (16, 24, 32), (16,)]),
        (Constraints(min_width=("*.mlp=17", "*.v=99")), [(8, 16, 24), (24,), (24, 32), (16,)]),
        # Of the second block q/k cannot be cut: then v, which would be narrower, is not either.
        (Constraints(equal_qkv=True), [(8, 16, 24), (8, 16, 24), (8, 16, 24, 32), (16,)]),
        (Constraints(min_width=("*.qk=16",), equal_qkv=True), [(16, 24), (16, 24), (8, 16, 24, 32), (16,)]),
        (Constraints(exclude=("*.qk",), equal_qkv=True), [(24,), (24,), (8, 16, 24, 32), (16,)]),
    ],
)
def test_widths_that_constraints_leave(constraints, expected):
    assert list(constraints.allowed(CHOICES).values()) == expected


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (
            Constraints(exclude=("block.*",)),
            "exclude='block.*': matches no layer that may be pruned; found blocks.0.attn.qk, "
            "blocks.0.attn.v, blocks.0.mlp.hidden and 1 more",
        ),
        (Constraints(min_width=("*.mlp",)), "min_width='*.mlp': expected PATTERN=N"),
        (Constraints(min_width=("*.mlp=0",)), "min_width='*.mlp=0': expected PATTERN=N"),
        (Constraints(min_width=("=8",)), "min_width='=8': expected PATTERN=N"),
    ],
)
def test_constraints_that_make_no_sense(constraints, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        constraints.allowed(CHOICES)


def test_q_k_and_v_of_other_widths_cannot_be_equal():
    choices = {("a", "qk"): (8, 16), ("a", "v"): (8, 16, 32)}
    with pytest.raises(UsageError, match=r"found 16 and 32 channels per head in a$"):
        Constraints(equal_qkv=True).allowed(choices)


def test_equal_widths_are_equal_whatever_they_cost():
    choices = dict.fromkeys([("a", "qk"), ("a", "v")], (8, 16, 24, 32))
    curves = {
        ("a", "qk"): {8: 0.1, 16: 0.0, 24: 0.0, 32: 0.0},
        ("a", "v"): {8: 90.0, 16: 50.0, 24: 20.0, 32: 0.0},
    }
    limits = [Limit(lambda widths: 10_000 + sum(widths.values()), 10_040)]
    assert cheapest_widths(curves, choices, limits) == {("a", "qk"): 8, ("a", "v"): 32}
    assert cheapest_widths(curves, choices, limits, equal=True) == {("a", "qk"): 16, ("a", "v"): 16}


@pytest.mark.slow
def test_constraints_hold_in_the_file(tiny_vit, tmp_path):
    free = prune(tiny_vit, tmp_path / "free.safetensors", round_to=4)
    cut = [unit for unit in free.plan if not unit.keeps_all]
    whole, wider = cut[0], cut[-1]
    least = wider.dense_width - 4
    assert wider.width < least
    names = [".".join(unit.key) for unit in (whole, wider)]
    given = {"exclude": (names[0],), "min_width": (f"{names[1]}={least}",), "round_to": 4}
    result = prune(tiny_vit, tmp_path / "slim.safetensors", **given)
    widths = result.plan.widths()
    assert widths[whole.key] == whole.dense_width
    assert widths[wider.key] >= least
    assert result.slim.flops <= result.budget


@pytest.mark.slow
def test_equal_widths_hold_in_the_file(tiny_vit, tmp_path):
    result = prune(tiny_vit, tmp_path / "slim.safetensors", equal_qkv=True, round_to=2, flops="55%")
    widths = result.plan.widths()
    pairs = [(widths[layer, "qk"], widths[layer, "v"]) for layer, kind in widths if kind == "v"]
    assert all(qk == v for qk, v in pairs)
    assert any(v < 16 for _, v in pairs)


def test_equal_widths_need_curves(tiny_vit, tmp_path):
    """Uniform widths are spent in steps of single units, which would part q/k and v."""
    with pytest.raises(UsageError, match="expected curves with equal_qkv=True"):
        prune(tiny_vit, tmp_path / "slim.safetensors", equal_qkv=True, allocation="uniform", flops="55%")


@pytest.mark.slow
def test_the_lowest_budget_is_that_under_the_constraints(tiny_vit, tmp_path):
    def lowest(flops: str, **constraints) -> float:
        with pytest.raises(mhacut.BudgetError, match="out of reach") as error:
            prune(tiny_vit, tmp_path / "slim.safetensors", flops=flops, **constraints)
        assert all(f"{name}=" in str(error.value) for name in constraints)
        return float(re.search(r"the lowest is \S+ \((\S+)% of", str(error.value)).group(1))

    free, least = lowest("1%"), lowest("1%", exclude="*.mlp")
    assert lowest(f"{(free + least) / 2}%", exclude="*.mlp") == least
    assert list(tmp_path.iterdir()) == []
    prune(tiny_vit, tmp_path / "slim.safetensors", flops=f"{least}%", exclude="*.mlp")
