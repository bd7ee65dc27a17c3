"""FLOPs on images that are not square and, where a model takes them, no multiples of its windows."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import mhacut
import timm_cases
import timm_cases_separate
from helpers import flatten, models
from helpers.plans import assert_costs_are_what_fvcore_counts
from mhacut.surgery.flops import measure_flops
from timm_cases_separate import LayerCase

CASES: dict[str, Any] = {
    **{f"vit {case.id} {'-'.join(case.args)}": case for case in models.CASES},
    **timm_cases.CASES,
    **timm_cases_separate.CASES,
    **{f"flatten {name}": name for name in flatten.CASES},
}
FAST = {
    "vit vit_tiny_patch16_224 depth-img_size-num_classes",
    "twins window",
    "twins model",
    "gcvit",
    "hiera",
    "sam",
    "coat parallel",
    "swin v2",
    "volo outlook",
    "halo",
    "flatten timm pvt",
}
ONE_SHAPE = {
    "nest",
    "mvit v2",
    "convit model",
    "efficientformer model",
    "convit",
    "maxxvit",
    "maxxvit, wider",
    "maxxvit, wider behind",
    "maxxvit, over heads",
    "maxxvit channels last",
    "maxxvit channels last, over heads",
    "levit",
    "levit, convolutions",
    "levit downsampling",
    "levit downsampling, convolutions",
    "efficientformer",
    "tiny_vit",
    "pooling, positions",
    "efficientformer_v2",
    "efficientformer_v2, coarser",
    "efficientformer_v2, downsampling",
    "efficientvit_msra",
    "efficientvit_msra, wider values",
    "efficientvit_msra, one head",
    "bottleneck",
    "bottleneck, biases",
    "lambda, table",
}
"""Cases that take images of one shape only."""


def made_for_uneven_images(case: Any) -> tuple[nn.Module, tuple[int, int, int]] | None:
    """The model of ``case``, and the first uneven size of images that it takes; None if there is none."""
    for channels, height, width in sizes(case):
        try:
            model = build(case, (height, width)).eval()
            with torch.no_grad():
                model(torch.zeros(1, channels, height, width))
        except (AssertionError, RuntimeError, ValueError, mhacut.UsageError):
            continue
        return model, (channels, height, width)
    return None


def sizes(case: Any) -> list[tuple[int, int, int]]:
    """[C, H, W] to try, the oddest first."""
    if isinstance(case, LayerCase):
        return [(case.dim, case.side + 1, case.side + 3), (case.dim, case.side, case.side + 2)]
    _, _, side = model_of(case)
    more = ((4, 20), (8, 24), (16, 32), (0, 16), (14, 28), (0, 32), (0, side))
    return [(3, side + height, side + width) for height, width in more]


def model_of(case: Any) -> tuple[str, dict[str, Any], int]:
    """Architecture, arguments and size of the (square) images of a case."""
    if isinstance(case, str):
        name, args = flatten.CASES[case]
        return name, args if case in flatten.FREE_SIZE else {**args, "img_size": 64}, 64
    if isinstance(case, models.Case):
        return case.architecture, case.args, case.args["img_size"]
    return case.architecture, case.args, case.size if isinstance(case, timm_cases.Case) else case.side


def build(case: Any, size: tuple[int, int]) -> nn.Module:
    if isinstance(case, LayerCase):
        return dataclasses.replace(case, args=(size,) if case.args else ()).create()
    architecture, args, _ = model_of(case)
    return timm.create_model(architecture, **({**args, "img_size": size} if "img_size" in args else args))


@pytest.mark.parametrize("name", models.slow_except(FAST, CASES))
def test_the_cost_table_is_what_fvcore_counts_on_uneven_images(name):
    made = made_for_uneven_images(CASES[name])
    assert (made is None) == (name in ONE_SHAPE)
    if made is not None:
        assert_costs_are_what_fvcore_counts(*made, seed=5)


@pytest.mark.parametrize("stated", ["as an argument", "by its folder"])
def test_twins_are_pruned_on_images_that_are_no_multiples_of_their_windows(stated, tmp_path):
    args = {"depths": [1, 1, 1, 1], "embed_dims": [16, 24, 32, 32], "num_heads": [1, 2, 4, 4]}
    model = timm.create_model("twins_svt_small", img_size=(224, 288), num_classes=5, **args)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    source: dict[str, Any] = {"checkpoint": tmp_path}
    if stated == "by its folder":
        cfg = {"input_size": [3, 224, 288], "num_classes": 5}
        stated_there = {"architecture": "twins_svt_small", "model_args": args, "pretrained_cfg": cfg}
        (tmp_path / "config.json").write_text(json.dumps(stated_there))
    else:
        args = {**args, "img_size": [224, 288], "num_classes": 5}
        source = {
            "checkpoint": tmp_path / "model.safetensors",
            "model": "twins_svt_small",
            "model_args": args,
        }
    pruned = mhacut.prune(
        **source,
        flops="85%",
        output=tmp_path / "slim.safetensors",
        effort="fast",
        calibration_images=4,
        latency=False,
    )
    assert 0.98 * pruned.budget < pruned.slim.flops <= pruned.budget
    assert pruned.dense.flops == measure_flops(model.eval(), (3, 224, 288))
    seen = mhacut.inspect(pruned.output).inspection
    assert (seen.input_size, seen.flops) == ((3, 224, 288), pruned.slim.flops)
