"""Every way to search, from file to file."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

import mhacut
from helpers.models import ModelCase, build
from mhacut.checkpoint.load import read_model
from mhacut.errors import UsageError
from mhacut.options.prune import Allocation, BasisChoice, Effort

ALLOCATIONS = get_args(Allocation)
BASES, EFFORTS = get_args(BasisChoice), get_args(Effort)
ARGS = {"depth": 2, "embed_dim": 24, "num_heads": 3, "img_size": 16, "patch_size": 8}


WAYS = [
    (allocation, basis, EFFORTS[(row + column) % 3], row == column)
    for row, allocation in enumerate(ALLOCATIONS)
    for column, basis in enumerate(BASES)
]
"""A Latin square: every pair of values of two options is tried."""
QUICK = {"steps": 2, "calibration_images": 8, "batch_size": 4, "latency": False, "round_to": 2}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "dense.safetensors"
    save_file(build(ModelCase("vit_tiny_patch16_224", {**ARGS, "num_classes": 5})).state_dict(), path)
    return path


def check(dense, folder, flops="55%", **options):
    result = mhacut.prune(
        dense,
        flops=flops,
        output=folder / "slim.safetensors",
        model="vit_tiny_patch16_224",
        model_args=ARGS,
        **{**QUICK, **options},
    )
    assert result.slim.flops <= result.budget < result.dense.flops
    assert result.slim.flops >= 0.97 * result.budget  # of so small a model, steps are large
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    in_memory, reloaded = result.model(), mhacut.load_model(result.output)
    state = in_memory.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in reloaded.state_dict().items())
    assert reloaded(images).isfinite().all()
    assert sum(tensor.numel() for tensor in load_file(result.output).values()) < sum(
        tensor.numel() for tensor in load_file(dense).values()
    )
    assert read_model(result.output).record.plan == result.plan
    return result


@pytest.mark.parametrize(
    ("allocation", "basis", "effort", "repair"),
    [
        pytest.param(*way, marks=pytest.mark.slow if number in (0, 4, 8) else pytest.mark.exhaustive)
        for number, way in enumerate(WAYS)
    ],
)
def test_some_ways_give_a_file_within_the_budget(dense, tmp_path, allocation, basis, effort, repair):
    options = {"allocation": allocation, "basis": basis, "effort": effort, "repair": repair}
    if effort == "best":
        options |= {"heal_steps": 2}
    result = check(dense, tmp_path, **options)
    assert bool(result.log) is (allocation == "indicator")
    assert bool(result.repairs) is repair
    cut = [unit for unit in result.plan if not unit.keeps_all]
    bases = {unit.basis for unit in cut}
    assert "principal" not in {unit.basis for unit in cut if unit.kind == "hidden"}
    if basis == "channel":
        assert bases == {"channel"}
    if basis == "principal" and (allocation != "indicator" or repair):
        assert {unit.basis for unit in cut if unit.kind != "hidden"} <= {"principal"}


@pytest.mark.slow
def test_the_indicators_choice_of_channels_is_kept_where_that_is_asked_for(dense, tmp_path):
    options = {"allocation": "indicator", "selection": "indicator"}
    result = check(dense, tmp_path, **options)
    assert {unit.basis for unit in result.plan} == {"channel"}
    assert result.repairs
    with pytest.raises(
        UsageError, match="basis='principal': expected channel or auto with selection='indicator'"
    ):
        check(dense, tmp_path, basis="principal", **options)


@pytest.mark.slow
def test_tokens_can_all_count_alike(dense, tmp_path):
    slim = {}
    for asked in (True, False):
        folder = tmp_path / str(asked)
        folder.mkdir()
        # Of the same widths, so that only what is fitted can differ.
        result = check(dense, folder, allocation="uniform", token_weights=asked)
        slim[asked] = result.plan.widths(), load_file(result.output)
    (widths, weighed), (others, alike) = slim[True], slim[False]
    assert widths == others
    assert any(not torch.equal(weighed[name], alike[name]) for name in weighed)
