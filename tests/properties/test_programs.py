"""Slim models of every attention class are programs of any batch size; MLPs keep timm's own code."""

from __future__ import annotations

import pytest
import torch

from helpers.models import Case, LayerCase, build, image, relative
from helpers.plans import random_plan
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.slice import cut
from properties.cases import BY_CLASS, FIRST_MODEL, IN_CI, mlps


def smallest(cases: list[Case]) -> Case:
    """One of one layer, whose forward pass is what a cut changes in a model; else the first."""
    return next((case for case in cases if isinstance(case, LayerCase)), cases[0])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            smallest(list(cases.values())),
            id=f"{cls.__module__}.{cls.__name__}",
            marks=pytest.mark.slow if cls in IN_CI or cls not in FIRST_MODEL else pytest.mark.exhaustive,
        )
        for cls, cases in BY_CLASS.items()
        if cls not in mlps.CASES
    ],
)
@torch.no_grad()
def test_a_slim_model_is_a_program_of_any_batch(case):
    slim = build(case)
    plan, _ = random_plan(find_prunable_layers(slim), seed=0)
    cut(slim, plan)
    batch = torch.export.Dim("batch", min=1, max=64)
    x, more = image(case), image(case, batch=3)
    program = torch.export.export(slim, (x,), dynamic_shapes=({0: batch},), strict=False)
    assert relative(program.module()(more), slim(more)) < 1e-5
