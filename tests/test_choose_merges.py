"""One budget for channels and tokens, end to end on a small ViT."""

from __future__ import annotations

import pytest
import torch

import mhacut
from helpers.models import ModelCase, build
from mhacut.cli.prune import _document, _text
from mhacut.commands import prune as commands
from mhacut.errors import MhacutError, UnsupportedModelError
from mhacut.pruning.choose_merges import divergence_with_tokens
from mhacut.surgery.flops import measure_flops

ARGS = {"depth": 3, "img_size": 96, "embed_dim": 48, "num_heads": 3, "num_classes": 10}
VIT = ModelCase("vit_tiny_patch16_224", ARGS)


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build(VIT)


def prune(model, path, flops, **options):
    return mhacut.prune(
        model,
        flops=flops,
        output=path,
        model_args={key: value for key, value in ARGS.items() if key not in ("img_size", "num_classes")},
        calibration_images=12,
        latency=False,
        effort="fast",
        **options,
    )


@torch.no_grad()
def test_tokens_and_channels_share_a_budget(model, tmp_path):
    result = prune(model, tmp_path / "slim.safetensors", "50%", scope="attention+mlp+tokens")
    slim = mhacut.load_model(result.output)
    assert sum(result.plan.tokens.merged) > 0
    assert 0.9 * result.budget <= result.slim.flops <= result.budget
    assert measure_flops(slim, (3, 96, 96)) == result.slim.flops
    assert slim(torch.randn(2, 3, 96, 96)).shape == (2, 10)


def test_models_without_global_attention_are_refused_by_name(tmp_path):
    swin = build(
        ModelCase("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4, "depths": (1, 1)})
    )
    with pytest.raises(UnsupportedModelError, match=r"SwinTransformer.*no plain ViT"):
        mhacut.prune(
            swin,
            flops="80%",
            output=tmp_path / "slim.safetensors",
            scope="attention+mlp+tokens",
            model_args={"window_size": 4, "depths": (1, 1)},
        )


def test_merges_are_compared_with_channels_by_curves_only(model, tmp_path):
    with pytest.raises(MhacutError, match="curves"):
        prune(model, tmp_path / "x.safetensors", "80%", scope="attention+mlp+tokens", allocation="uniform")


def test_a_budget_out_of_reach_is_refused_before_the_work(model, tmp_path, monkeypatch):
    def never(*args, **options):
        raise AssertionError("calibrated")

    monkeypatch.setattr("mhacut.pruning.job.calibrate", never)
    with pytest.raises(MhacutError, match=r"the lowest is .*attention\+mlp\+tokens"):
        prune(model, tmp_path / "slim.safetensors", "3%", scope="attention+mlp+tokens")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("left", "said"), [(0.1, True), (0.6, False)])
def test_after_a_deep_cut_of_channels_it_is_said_what_tokens_would_leave(
    model, tmp_path, monkeypatch, left, said
):
    """Where that is less than half."""
    silent = prune(model, tmp_path / "silent.safetensors", "50%")
    monkeypatch.setattr(commands, "MUCH", 0.0)
    monkeypatch.setattr(commands, "divergence_with_tokens", lambda *given: left * silent.divergence)
    result = prune(model, tmp_path / "slim.safetensors", "50%")
    assert (result.with_tokens is not None) == said
    assert ("attention+mlp+tokens' the same budget would leave about" in _text(result)) == said
    assert _document(result)["divergence_with_tokens"] == result.with_tokens


def test_of_a_cut_that_left_little_nothing_is_said(model, tmp_path):
    result = prune(model, tmp_path / "slim.safetensors", "80%")
    assert result.divergence < commands.MUCH
    assert result.with_tokens is None
    assert "would leave" not in _text(result)


def test_what_tokens_would_leave_is_estimated_for_what_can_merge_tokens(model, tmp_path, monkeypatch):
    """The real estimate, which is a number for a ViT and None for others."""
    found = []

    def recorded(*given):
        found.append(divergence_with_tokens(*given))

    monkeypatch.setattr(commands, "MUCH", 0.0)
    monkeypatch.setattr(commands, "divergence_with_tokens", recorded)
    prune(model, tmp_path / "slim.safetensors", "50%")
    prune(model, tmp_path / "uniform.safetensors", "50%", allocation="uniform")
    assert 0 < found[0] < 10
    assert found[1] is None  # no curves: nothing says what channels cost
