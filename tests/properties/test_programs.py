"""Slim models of every attention class are programs of any batch size; MLPs keep timm's own code."""

from __future__ import annotations

import pytest
import torch
from timm.models import gemma4_vit, hiera

from helpers.models import Case, LayerCase, ModelCase, build, image, relative
from helpers.plans import random_plan
from mhacut.exporting.runtimes import onnx_content, onnx_runner
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.slice import cut
from properties.cases import BY_CLASS, FIRST_MODEL, UNLIKE_ATTENTION, mlps

BIAS = ModelCase("beit_base_patch16_224", {"depth": 1, "img_size": 64, "embed_dim": 48, "num_heads": 3})
"""One with a bias, on which it fails while gradients are recorded."""


def smallest(cases: list[Case]) -> Case:
    """One of one layer, whose forward pass is what a cut changes in a model; else the first."""
    return next((case for case in cases if isinstance(case, LayerCase)), cases[0])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            smallest(list(cases.values())),
            id=f"{cls.__module__}.{cls.__name__}",
            marks=pytest.mark.slow if cls in UNLIKE_ATTENTION else pytest.mark.exhaustive,
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


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(BIAS, id="a bias", marks=pytest.mark.slow),
        *(
            pytest.param(
                case,
                id=f"{cls.__module__}.{cls.__name__}",
                # Torch's own translation to ONNX fails on its fused attention of 5 dimensions.
                marks=pytest.mark.slow if cls is hiera.MaskUnitAttention else pytest.mark.exhaustive,
            )
            for cls, case in FIRST_MODEL.items()
            if cls not in mlps.CASES and cls is not gemma4_vit.Gemma4Attention
        ),
    ],
)
def test_a_dense_model_is_an_onnx_program_of_any_batch(case):
    """Slim models with equal q/k and v widths have timm's own attention, too; gradients are on.

    Of Gemma 4, onnxscript makes a program that ONNX Runtime refuses.
    """
    model, more = build(case).requires_grad_(True), image(case, batch=3)
    fused = [getattr(module, "fused_attn", None) for module in model.modules()]
    with torch.no_grad():
        expected = model(more)  # and caches of positions are filled, which torch warns of in an export
    assert relative(onnx_runner(onnx_content(model, case.size))(more), expected) < 1e-4
    assert fused == [getattr(module, "fused_attn", None) for module in model.modules()]
