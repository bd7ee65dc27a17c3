from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhacut.errors import PlanError
from mhacut.plan import Basis, Plan, TokenPlan, UnitPlan


@st.composite
def unit_plans(draw):
    dense_width, heads = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    width = draw(st.integers(1, dense_width))
    rows = [sorted(draw(st.permutations(range(dense_width)))[:width]) for _ in range(heads)]
    basis = draw(st.sampled_from(get_args(Basis)))
    return UnitPlan("blocks.0.attn", "v", dense_width, tuple(map(tuple, rows)), basis)


@given(unit=unit_plans())
def test_json_round_trip(unit):
    plan = Plan((unit,))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@given(data=st.data(), first=unit_plans())
def test_two_cuts_are_one(data, first):
    width = data.draw(st.integers(1, first.width))
    rows = [sorted(data.draw(st.permutations(range(first.width)))[:width]) for _ in range(first.heads)]
    second = UnitPlan(first.layer, first.kind, first.width, tuple(map(tuple, rows)))
    channels = [[(head, channel) for channel in range(first.dense_width)] for head in range(first.heads)]
    for plan in (first, second):
        channels = [[row[i] for i in kept] for row, kept in zip(channels, plan.kept, strict=True)]
    both = second.after(first)
    assert channels == [[(head, i) for i in kept] for head, kept in enumerate(both.kept)]
    assert both.dense_width == first.dense_width
    assert both.basis == first.basis


@given(data=st.data(), first=unit_plans())
def test_principal_channels_are_counted_anew_by_every_cut(data, first):
    # They are mixtures of what was left, whatever that was: no index of the dense model names them.
    width = data.draw(st.integers(1, first.width))
    second = UnitPlan(first.layer, first.kind, first.width, (tuple(range(width)),) * first.heads, "principal")
    both = second.after(first)
    if width == first.width:
        assert both == first
    else:
        assert (both.basis, both.kept, both.dense_width) == ("principal", second.kept, first.dense_width)


@given(unit=unit_plans())
def test_files_that_name_no_basis_mean_the_models_own_channels(unit):
    (document,) = Plan((unit,)).to_json()
    del document["basis"]
    assert Plan.from_json([document]) == Plan((replace(unit, basis="channel"),))


def test_a_later_plan_may_name_fewer_or_other_units():
    first = Plan((UnitPlan("a", "v", 4, ((0, 2),)), UnitPlan("b", "hidden", 3, ((1,),))))
    second = Plan((UnitPlan("a", "v", 2, ((1,),)), UnitPlan("c", "qk", 5, ((0, 4),))))
    assert second.after(first).widths() == {("a", "v"): 1, ("b", "hidden"): 1, ("c", "qk"): 2}
    assert second.after(first).units[0].kept == ((2,),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("blocks.0.attn", "v", 4, ((0, 1), (2,))), "head 0 keeps 2 and head 1 keeps 1"),
        (("blocks.0.attn", "v", 4, ((1, 0),)), "not strictly ascending"),
        (("blocks.0.attn", "v", 4, ((1, 1),)), "not strictly ascending"),
        (("blocks.0.attn", "v", 4, ((0, 4),)), "must lie in 0..3, found 0..4"),
        (("blocks.0.attn", "v", 4, ((-1, 0),)), "must lie in 0..3"),
        (("blocks.0.attn", "v", 4, ((),)), "at least 1 kept channel"),
        (("blocks.0.attn", "v", 4, ()), "expected at least 1 head"),
        (("../evil", "v", 4, ((0,),)), "expected a layer name"),
        (("blocks.0.attn", "w", 4, ((0,),)), "expected the kind"),
        (("blocks.0.attn", "v", 4, ((0,),), "svd"), "expected the basis channel or principal"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(arguments, message):
    with pytest.raises(PlanError, match=message):
        UnitPlan(*arguments)


@pytest.mark.parametrize(
    "document",
    [
        {},
        [1],
        [{"layer": "a"}],
        [{"layer": "a", "kind": "v", "dense_width": True, "kept": [[0]]}],
        [{"layer": "a", "kind": "v", "dense_width": 2, "kept": [[0.5]]}],
        [{"layer": "a", "kind": "v", "dense_width": 2, "kept": 7}],
        [{"layer": 3, "kind": "v", "dense_width": 2, "kept": [[0]]}],
        [{"layer": "a", "kind": "v", "dense_width": 2, "kept": [[0]], "basis": None}],
        [{"layer": "a", "kind": "v", "dense_width": 2, "kept": [[0]], "basis": ["channel"]}],
        [{"layer": "a", "kind": "v", "dense_width": 2, "kept": [[0]], "bases": "channel"}],
        [{"layer": "a", "kind": "v", "dense_width": 2, "kept": [[0]]}] * 2,
    ],
)
def test_documents_from_elsewhere_are_refused(document):
    with pytest.raises(PlanError):
        Plan.from_json(document)


def test_a_later_plan_states_all_tokens_that_are_left_out_or_merged():
    first = Plan((), TokenPlan(output_tokens=1, merged=(1, 1)))
    for later in (TokenPlan(output_tokens=1), TokenPlan(output_tokens=1, merged=(2, 0))):
        assert Plan((), later).after(first).tokens == later


def test_plans_of_tokens_go_through_json():
    unmerging = TokenPlan(merged=(0, 3), unmerge=True)
    for plan in (
        TokenPlan(),
        TokenPlan(output_tokens=2),
        TokenPlan(merged=(0, 3)),
        TokenPlan(1, (4,)),
        unmerging,
    ):
        assert TokenPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
        assert bool(plan) == (plan != TokenPlan(merged=(0, 0)))
    sized = TokenPlan(merged=(0, 3), patches=64)
    assert TokenPlan.from_json(sized.to_json()).patches == 64
    assert Plan.from_json([], {"read": 1}).tokens == TokenPlan(output_tokens=1)
    before = {"merged": [0, 3], "rule": "weights", "copied": True}  # in files from before the checkerboard
    assert TokenPlan.from_json(before) == TokenPlan(merged=(0, 3), unmerge="rows")
    assert TokenPlan.from_json(before).to_json() == before


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"reads": 1},
        {"read": None},
        {"read": 0},
        {"read": True},
        {"read": 1.0},
        {"merged": 3},
        {"merged": [-1]},
        {"merged": [1.5]},
        {"merged": [0, 8]},
        {"merged": [0, 8], "rule": "another"},
        {"merged": [0, 8], "rule": "checkerboard"},
        {"merged": [0, 8], "rule": "weights", "patches": 0},
        {"merged": [0, 8], "rule": "weights", "patches": 1.5},
    ],
    ids=repr,
)
def test_plans_of_tokens_that_are_none_are_refused(document):
    with pytest.raises(PlanError, match="token"):
        TokenPlan.from_json(document)
