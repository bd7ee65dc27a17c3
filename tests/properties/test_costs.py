"""The FLOPs that a plan is promised to cost are those of the slim model.

On images of a model's own size, and on ones that are not square and, where it takes them, no multiples of its
windows.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import mhacut
from helpers.models import Case, LayerCase, ModelCase
from helpers.plans import random_plan
from mhacut.surgery.costs import build_cost_table
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.slice import cut
from properties.cases import BY_CLASS, CASES

FAST = {
    "attention.Attention",
    "twins.LocallyGroupedAttn",
    "volo.OutlookAttention",
    "halo_attn.HaloAttn",
    "pvt_v2.Attention",
}
UNEVEN = [name for name in CASES if ", " not in name or name in FAST or name.endswith(", model")]
"""One of each class, without what is special, and whole models."""


def made_for_uneven_images(case: Case) -> tuple[nn.Module, tuple[int, int, int]] | None:
    """The model of ``case``, and the first uneven size of images that it takes; None if there is none."""
    channels, *side = case.size
    # The oddest first.
    more = (
        ((1, 3), (0, 2))
        if isinstance(case, LayerCase)
        else ((4, 20), (8, 24), (16, 32), (0, 16), (14, 28), (0, 32), (0, side[1]))
    )
    for height, width in ((side[0] + down, side[1] + across) for down, across in more):
        try:
            model = build(case, (height, width)).eval()
            with torch.no_grad():
                model(torch.zeros(1, channels, height, width))
        except (AssertionError, RuntimeError, ValueError, mhacut.UsageError):
            continue
        return model, (channels, height, width)
    return None


def build(case: Case, size: tuple[int, int]) -> nn.Module:
    if isinstance(case, LayerCase):
        args = tuple(size if isinstance(part, tuple) else part for part in case.args)
        return dataclasses.replace(case, args=args).create()
    assert isinstance(case, ModelCase)
    sized = {"img_size": size} if "img_size" in case.args else {}
    return dataclasses.replace(case, args={**case.args, **sized}).create()


def assert_the_table_is_what_fvcore_counts(model: nn.Module, size: tuple[int, int, int], seed: int) -> None:
    prunable = find_prunable_layers(model)
    table = build_cost_table(model, prunable, size)
    assert table.flops({}) == table.dense
    plan, _ = random_plan(prunable, seed)
    cut(model, plan)
    assert table.flops(plan.widths()) == measure_flops(model, size)


FIRST = {next(iter(cases.values())) for cases in BY_CLASS.values()}
OWN_SIZE = [
    pytest.param(
        name,
        marks=() if name in FAST else pytest.mark.slow if case in FIRST else pytest.mark.exhaustive,
    )
    for name, case in CASES.items()
    if name in FAST or case.fast or isinstance(case, LayerCase)
]
"""Other models are held to it by ``test_files``: pruning compares what was promised with the slim model."""


@pytest.mark.parametrize("name", OWN_SIZE)
def test_the_cost_table_is_what_fvcore_counts(name):
    case = CASES[name]
    assert_the_table_is_what_fvcore_counts(case.create().eval(), case.size, seed=0)


def uneven_marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
    if name in ("twins.LocallyGroupedAttn", "pvt_v2.Attention"):
        return ()
    return (pytest.mark.slow if name in FAST else pytest.mark.exhaustive,)


@pytest.mark.parametrize("name", [pytest.param(name, marks=uneven_marks(name)) for name in UNEVEN])
def test_the_cost_table_is_what_fvcore_counts_on_uneven_images(name):
    made = made_for_uneven_images(CASES[name])
    if made is None:
        pytest.skip("takes images of one shape only")
    assert_the_table_is_what_fvcore_counts(*made, seed=5)
