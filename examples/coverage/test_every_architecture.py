"""Every kind of architecture that timm has is cut on paper, and what checks that sees what is wrong.

One of each kind, but for those that a small model in ``properties/`` is like: that is pruned with weights.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.models import ModelCase
from helpers.threads import on_a_short_stack
from mhacut.commands.models import build_weightless
from mhacut.errors import UnsupportedModelError
from mhacut.surgery.find import find_prunable_layers
from properties.cases import CASES

sys.path.insert(0, str(Path(__file__).parent))  # the scripts import each other

import sweep
import trial

pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10),
    reason="older torch cannot trace convolutions on the meta device, as examples/coverage does",
)
REPRESENTATIVES = sweep.REPRESENTATIVES.read_text(encoding="utf-8").split()


IN_CI = {"bat_resnext26ts": (), "eca_botnext26ts_256": pytest.mark.slow}
"""Marks of those that CI tries."""
assert set(REPRESENTATIVES) >= set(IN_CI)


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=IN_CI.get(name, pytest.mark.exhaustive)) for name in REPRESENTATIVES],
)
@on_a_short_stack
def test_no_architecture_fails(architecture):
    if has_small_model(architecture):
        pytest.skip("a small model of the same classes is pruned, from file to file, in properties/")
    outcome = trial.examine(architecture)
    assert outcome.failures == []
    assert outcome.flops is None or outcome.flops[1] < outcome.flops[0]


def has_small_model(architecture: str) -> bool:
    try:
        return classes_of(build_weightless(architecture)) in small_models()
    except UnsupportedModelError:
        return False


def classes_of(model: nn.Module) -> tuple[str, frozenset[object]]:
    """Class of ``model``, and of its layers with what of them is cut, and why something is not."""
    layers = (
        (
            type(model.get_submodule(layer.name)).__name__,
            frozenset((unit.kind, unit.sharing, unit.mixing) for unit in layer.units),
            frozenset(layer.not_prunable.items()),
        )
        for layer in find_prunable_layers(model).layers
    )
    return type(model).__name__, frozenset(layers)


@cache
def small_models() -> set[tuple[str, frozenset[object]]]:
    """Classes of the models that ``properties/`` prunes."""
    with torch.device("meta"):
        return {classes_of(case.create()) for case in CASES.values() if isinstance(case, ModelCase)}
