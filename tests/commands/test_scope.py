"""``prune --scope auto``: what the plain command cuts, and what it says about that."""

from __future__ import annotations

import pytest

import mhacut
from helpers.jobs import Recorder
from helpers.models import ModelCase, build
from helpers.pruning import QUICK, last_step

ARGS = {"depth": 3, "embed_dim": 48, "num_heads": 3, "patch_size": 8}
VIT = ModelCase("vit_tiny_patch16_224", {**ARGS, "img_size": 32})
SWIN = ModelCase(
    "swin_tiny_patch4_window7_224",
    {"img_size": 64, "window_size": 4, "depths": (1, 1), "embed_dim": 24, "num_heads": (2, 2)},
)


def pruned(case, output, **options):
    reporter, args = Recorder(), {**case.args}
    given = {"flops": "60%", "model_args": args, "reporter": reporter, "output": output, **QUICK, **options}
    result = mhacut.prune(build(case), **given)
    return result, [line for line in reporter.messages if line.startswith("scope: ")]


@pytest.mark.slow
def test_a_plain_vit_that_classifies_merges_tokens_if_that_saves_time(tmp_path):
    result, (line,) = pruned(VIT, tmp_path / "slim.safetensors", flops="35%")
    assert line == (
        "scope: channels and token merging (no patch features). scope='attention+mlp' cuts channels only. "
        "ONNX, OpenVINO and pt2 exports run anywhere; eager PyTorch needs mhacut"
    )
    assert not result.plan.tokens.merged  # so small a model is faster without
    assert last_step(result.output)["options"]["scope"] == "auto"  # a run of the same options gives the same


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "options", "reason"),
    [
        (SWIN, {"flops": "80%"}, "SwinTransformer is not a plain ViT, in which every block sees all tokens"),
        (VIT, {"flops": None, "params": "70%"}, "token merging does not reduce parameters or file size"),
        (VIT, {"preserve": "pooled"}, "merged tokens have no separate features"),
        (
            VIT,
            {"preserve": "blocks.1,blocks.1.attn"},
            "tokens are read inside blocks, where they are not copied back",
        ),
        (VIT, {"keep_dead_tokens": True}, "merged tokens have no separate features"),
        (VIT, {"allocation": "uniform"}, "allocation='uniform'"),
    ],
)
def test_elsewhere_channels_are_cut_alone(tmp_path, case, options, reason):
    result, lines = pruned(case, tmp_path / "slim.safetensors", **options)
    assert lines == [f"scope: channels only: {reason}"]
    assert not result.plan.tokens.merged


def test_a_scope_that_is_given_is_taken(tmp_path):
    result, lines = pruned(VIT, tmp_path / "slim.safetensors", flops="70%", scope="attention")
    assert lines == []
    assert all(unit.keeps_all for unit in result.plan if unit.kind == "hidden")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scope", "flops", "options"),
    [
        ("attention", "60%", {}),
        ("attention+mlp", "40%", {}),
        ("auto", "40%", {}),
        ("auto", "45%", {"exclude": ("*",)}),  # merges, and no channels
    ],
)
def test_a_budget_is_used(scope, flops, options):
    """Also where most cuts and merges cost nothing, as in a model of random weights."""
    args = {**ARGS, "patch_size": 4}
    model = build(ModelCase(VIT.architecture, {**args, "img_size": 48}))
    given = {**QUICK, "model_args": args, "round_to": 2, "dry_run": True, **options}
    result = mhacut.prune(model, flops=flops, scope=scope, **given)
    assert 0.99 * result.budget <= result.slim.flops <= result.budget
