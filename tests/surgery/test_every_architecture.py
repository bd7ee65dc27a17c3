"""Every kind of architecture that timm has is cut on paper, and what checks that sees what is wrong.

One of each kind, but for those that a small model in ``properties/`` is like: that is pruned with weights.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from helpers.models import ModelCase
from helpers.threads import on_a_short_stack
from mhacut.commands.models import build_weightless
from mhacut.errors import UnsupportedModelError
from mhacut.surgery.costs import CostTable
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.flops import measure_flops, weightless
from properties.cases import CASES

COVERAGE = Path(__file__).parents[2] / "examples" / "coverage"
sys.path.insert(0, str(COVERAGE))  # the scripts import each other

import sweep  # noqa: E402
import trial  # noqa: E402
from meta import TraceableOnMeta  # noqa: E402

pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10),
    reason="older torch cannot trace convolutions on the meta device, as examples/coverage does",
)
REPRESENTATIVES = sweep.REPRESENTATIVES.read_text(encoding="utf-8").split()
SMALL = {"depth": 1, "img_size": 32, "embed_dim": 48, "num_heads": 3, "patch_size": 8}


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


def small_vit(monkeypatch, change=None) -> trial.Outcome:
    """What is found out about a small ViT that ``change`` was made to."""

    def build(name: str) -> nn.Module:
        with torch.device("meta"):
            model = timm.create_model(name, **SMALL)
        if change is not None:
            change(model)
        return model

    monkeypatch.setattr(trial, "build_weightless", build)
    monkeypatch.setattr(trial, "_check_file", lambda *arguments: None)  # timm's own would be built again
    return trial.examine("vit_tiny_patch16_224")


def test_nothing_is_wrong_with_a_vit(monkeypatch):
    outcome = small_vit(monkeypatch)
    assert outcome.failures == outcome.notes == []
    assert outcome.signature == (
        "VisionTransformer",
        ("Attention",),
        ("Mlp",),
        ("qk", "v", "hidden"),
        (),
        "",
    )
    dense, slim = outcome.flops
    assert 0.5 * dense < slim < 0.8 * dense


def test_attention_that_nobody_names_is_found(monkeypatch):
    class Mixer(nn.Module):
        """Attention, by another name."""

        def forward(self, x):
            return x + (x @ x.mT).softmax(-1) @ x

    def change(model: nn.Module) -> None:
        model.norm = Mixer()

    (failure,) = small_vit(monkeypatch, change).failures
    assert failure == "silently left whole: activations are multiplied in norm (Mixer, 1 modules)"


def test_a_promise_that_is_not_kept_is_found(monkeypatch):
    honest = CostTable.flops
    monkeypatch.setattr(CostTable, "flops", lambda self, widths: honest(self, widths) + len(widths))
    (failure,) = small_vit(monkeypatch).failures
    assert failure.startswith("FLOPs: ")


def test_what_was_not_cut_is_found(monkeypatch):
    monkeypatch.setattr(trial, "cut", lambda model, plan: None)
    failures = small_vit(monkeypatch).failures
    assert "blocks.0.attn.qkv.weight: not narrower, 144 to 144" in failures
    assert "the cut: the slim model is not seen to have the planned widths" in failures
    assert "the cut: not fewer parameters" in failures


def test_what_crashes_is_named_and_the_others_go_on(monkeypatch, capsys, tmp_path):
    def build(name: str) -> nn.Module:
        if name.startswith("deit_"):
            raise RuntimeError("no such luck")
        return build_weightless(name)

    monkeypatch.setattr(trial, "build_weightless", build)
    assert sweep.main(["*t_tiny_patch16_224", "--json", str(tmp_path / "found.json")]) == 1
    printed = capsys.readouterr().out
    assert "| q/k and v of every layer are cut | 1 |" in printed
    assert printed.endswith("\nFailures: 1\ndeit_tiny_patch16_224: crash: RuntimeError: no such luck\n")
    deit, vit = json.loads((tmp_path / "found.json").read_text())["architectures"]
    assert deit["failures"] == ["crash: RuntimeError: no such luck"]
    assert vit["entry"]["attention"] == ["Attention"]
    assert sweep.main(["nothing_like_it"]) == 2


@pytest.mark.parametrize(
    "architecture",
    [
        "vit_tiny_patch16_224",
        "levit_128s",
        pytest.param("flatten_swin_tiny_224", marks=pytest.mark.slow),
    ],
)
def test_models_without_weights_cost_the_same_on_every_device(architecture):
    model = build_weightless(architecture).eval()
    with TraceableOnMeta():
        counted = measure_flops(model, (3, 224, 224))
    assert counted == measure_flops(weightless(model), (3, 224, 224))
