"""Outputs to preserve: whitened divergences, their gradients, and what ``--preserve`` decides."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import mhacut
from helpers.jobs import Recorder, flops_limit, job_of
from helpers.models import ModelCase, build, image
from mhacut.errors import UnsupportedModelError, UsageError
from mhacut.linalg.moments import Moments
from mhacut.options.prune import SearchOptions
from mhacut.pruning.calibrate import calibrate
from mhacut.pruning.curves import sensitivity_curves
from mhacut.pruning.planner import Planner
from mhacut.pruning.preserve import FLOOR, KEPT, SHRINKAGE, Preserved, Whitening
from mhacut.runtime.distributed import Processes
from mhacut.surgery.features import find_layers, find_pyramid, find_token_map
from mhacut.surgery.find import find_prunable_layers
from properties.cases import CASES

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 3, "img_size": 16, "patch_size": 8, "num_classes": 5}
VIT = ModelCase("vit_tiny_patch16_224", {**SMALL, "num_classes": 0})
SWIN = ModelCase(
    "swin_tiny_patch4_window7_224", {"img_size": 32, "window_size": 4, "depths": (1, 1), "num_classes": 0}
)
FLATTEN_ARGS = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 40, 64)}
FLATTEN = ModelCase("flatten_pvt_tiny", {"img_size": 32, **FLATTEN_ARGS, "num_classes": 0})
ALONE = Processes(0, 1, torch.device("cpu"))
QUICK = {"effort": "fast", "calibration_images": 6, "latency": False, "round_to": 1, "batch_size": 3}


def preserved_of(model, what, x):
    prunable = find_prunable_layers(model)
    if what == "tokens":
        features = find_token_map(model, prunable, x[:1])
    elif what == "pyramid":
        features = find_pyramid(model, x[:1])
    else:
        features = find_layers(model, what.split(","), prunable, x[:1])
    kind = what if what in ("tokens", "pyramid") else "layers"
    return Preserved(kind, "dense", features).fitted(model, x, 4, ALONE)


def slow_divergence(found, dense, over):
    """Divergence of normal distributions, token by token, of maps [B, tokens, C]; S is that of ``over``."""
    total = 0.0
    for one, other, all_tokens in zip(found, dense, over, strict=True):
        rows = all_tokens.double().flatten(0, 1)
        covariance = torch.cov(rows.mT, correction=0)
        shrunk = covariance * (1 - SHRINKAGE)
        for channel in range(len(shrunk)):
            least = FLOOR * float(covariance.diagonal().mean())
            shrunk[channel, channel] = max(float(covariance[channel, channel]), least)
        inverse = torch.linalg.inv(shrunk)
        errors = (one - other).double().flatten(0, 1)
        each = [float(error @ inverse @ error) / 2 for error in errors]
        total += sum(each) / len(each) / len(found)
    return total


@pytest.mark.parametrize(
    ("case", "what"),
    [
        (VIT, "tokens"),
        (VIT, "blocks.0,blocks.1"),
        (VIT, "pyramid"),
        (SWIN, "tokens"),
        (SWIN, "pyramid"),
        (SWIN, "layers.0,layers.1.blocks.0"),
        (FLATTEN, "tokens"),
        (FLATTEN, "pyramid"),
    ],
    ids=lambda value: value.architecture if isinstance(value, ModelCase) else value,
)
@torch.no_grad()
def test_the_divergence_is_that_of_normal_distributions(case, what):
    model, other = (build(case, dtype=torch.float64, seed=seed) for seed in (0, 1))
    x = image(case, batch=6, dtype=torch.float64)
    preserved = preserved_of(model, what, x)
    maps, others = (preserved.features.of(each, x) for each in (model, other))
    expected = slow_divergence(others, maps, maps)
    found = float(preserved.divergence(preserved.outputs(other, x), preserved.outputs(model, x)))
    assert found == pytest.approx(expected, rel=1e-3)
    assert float(preserved.divergence(preserved.outputs(model, x), preserved.outputs(model, x))) == 0


@pytest.mark.parametrize("classes", [0, 1])
@torch.no_grad()
def test_the_divergence_of_features_does_not_depend_on_batches(classes):
    case = ModelCase(VIT.architecture, {**SMALL, "num_classes": classes})
    model, other = (build(case, dtype=torch.float64, seed=seed) for seed in (0, 1))
    x = image(case, batch=6, dtype=torch.float64)
    job = replace(
        job_of(model, x, options=SearchOptions(batch_size=4)), preserved=Preserved.outputs_of(model)
    )
    calibration = job.calibrate()
    dense, found = model(x), other(x)
    unit = model(x[calibration.held :]).var()
    expected = float((found - dense).square().mean() / unit)
    for batch_size in (1, 2, 6):
        options = replace(job.options, batch_size=batch_size)
        judge = replace(job, options=options).distillation(calibration)
        assert judge.divergence_of(other) == pytest.approx(expected, rel=1e-5)


def test_a_metric_takes_the_place_of_the_covariance():
    rows = torch.randn(400, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    plain, half = Whitening.of(Moments.of(rows)).matrix, torch.randn(5, 1, dtype=torch.float64)
    metric, precision = half @ half.mT, (plain @ plain.mT).double()
    trace = torch.trace(metric @ precision.inverse())  # divergence of an error of this covariance
    expected = metric + KEPT * trace / 5 * precision
    found = Whitening.of(Moments.of(rows), metric).matrix.double()
    assert torch.allclose(found @ found.mT / 2, expected, rtol=1e-4)


@torch.no_grad()
def test_fisher_information_foretells_the_divergence_of_small_errors():
    """Random errors of a layer's output, independent over tokens: 1/2 tr(F E[e e^T])."""
    model = build(VIT, dtype=torch.float64).requires_grad_(False)
    prunable, x = find_prunable_layers(model), image(VIT, batch=300, dtype=torch.float64)
    preserved = preserved_of(model, "tokens", x[:64])
    found = calibrate(model, prunable, x, batch_size=100, preserved=preserved, fisher_images=400)
    preserved = found.preserved
    generator = torch.Generator().manual_seed(3)
    for name in ("blocks.0.attn", "blocks.1.mlp"):
        module, noise = model.get_submodule(name), []

        def disturb(module, args, output, noise=noise):
            noise.append(1e-3 * torch.randn(output.shape, generator=generator, dtype=output.dtype))
            return output + noise[-1]

        dense = preserved.outputs(model, x)
        handle = module.register_forward_hook(disturb)
        true = float(preserved.divergence(preserved.outputs(model, x), dense))
        handle.remove()
        rows = noise[0].flatten(0, 1)
        energy = rows.mT @ rows / len(rows)
        assert float((found.fisher.matrices[name] * energy).sum()) / 2 == pytest.approx(true, rel=0.1)


def test_layers_behind_all_that_is_preserved_cost_nothing():
    model, x = build(VIT).requires_grad_(False), image(VIT, batch=8)
    job = job_of(model, x, counted=True, round_to=1, options=SearchOptions(effort="fast", batch_size=4))
    preserved = preserved_of(model, "blocks.0", x)
    object.__setattr__(job, "preserved", preserved)
    calibration = job.calibrate()
    assert not calibration.fisher.matrices["blocks.1.mlp"].any()
    assert calibration.fisher.matrices["blocks.0.mlp"].any()
    planner = Planner(job, calibration)
    candidates = {key: each[0] for key, each in planner.candidates.items()}
    curves = sensitivity_curves(job, calibration, candidates)
    assert all(not any(curves[key].values()) for key in curves if key[0].startswith("blocks.1."))
    widths = planner.plan(flops_limit(job, 0.7)).plan.widths()
    assert widths["blocks.1.mlp", "hidden"] < widths["blocks.0.mlp", "hidden"]


@torch.no_grad()
def test_outputs_that_would_not_fit_are_thinned(monkeypatch):
    model, x = build(VIT), image(VIT, batch=4)
    preserved = preserved_of(model, "tokens", x)
    whole = preserved.features.of(model, x)[0]
    monkeypatch.setattr("mhacut.pruning.preserve.MAX_BYTES", whole.nbytes // 2)
    thin = preserved.thinned(model, x[:1], 4)
    assert thin.steps == 2
    outputs = thin.outputs(model, x)
    assert outputs.shape == (4, whole[:, ::2].flatten(1).shape[1])
    expected = preserved.whitenings[0](whole[:, ::2]) / whole[:, ::2].shape[1] ** 0.5
    assert torch.allclose(outputs, expected.flatten(1))


def pruned(model, tmp_path, args=None, **options):
    reporter = Recorder()
    args = {"model_args": args} if args else {}
    given = {**QUICK, "flops": "80%", "output": tmp_path / "slim.safetensors", **args, **options}
    return mhacut.prune(model, reporter=reporter, **given), reporter.messages


ARGS = {name: value for name, value in SMALL.items() if name not in ("num_classes", "img_size")}


@pytest.mark.slow
def test_without_a_classifier_the_features_of_all_tokens_are_preserved(tmp_path):
    result, messages = pruned(build(VIT), tmp_path, ARGS)
    (line,) = (each for each in messages if each.startswith("the model has no classifier: "))
    assert "all tokens" in line
    assert (result.metric, dict(result.preserved)) == ("dense", {"what": "tokens"})
    with safe_open(result.output, "pt") as file:
        (entry,) = json.loads(file.metadata()["mhacut"])["history"]
    assert (entry["preserved"], entry["divergence_of"]) == ({"what": "tokens"}, "dense")
    assert any("divergence of features, nats per token" in row[0] for row in result.rows())
    asked, _ = pruned(build(VIT), tmp_path, ARGS, preserve="tokens", overwrite=True)
    same = load_file(result.output), load_file(asked.output)
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])


SIGLIP = ModelCase("vit_base_patch16_siglip_224", {**SMALL, "num_classes": 0})
CAIT = ModelCase("cait_xxs24_224", SMALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "preserve", "whole"),
    [
        (SIGLIP, None, "attn_pool"),
        (SIGLIP, "pyramid", "attn_pool"),
        (CAIT, "pyramid", "blocks_token_only.0.attn"),
    ],
)
def test_layers_that_do_not_run_for_what_is_preserved_stay_whole(tmp_path, case, preserve, whole):
    model = build(case)
    result, _ = pruned(model, tmp_path, ARGS, preserve=preserve)
    assert any(line.startswith(f"{whole}: does not run for the ") for line in result.not_prunable)
    slim = mhacut.load_model(result.output)
    shapes = [
        {name: x.shape for name, x in each.get_submodule(whole).state_dict().items()}
        for each in (model, slim)
    ]
    assert shapes[0] == shapes[1]
    assert all(
        torch.equal(x, slim.get_parameter(f"{whole}.{name}"))
        for name, x in model.get_submodule(whole).named_parameters()
    )
    assert result.slim.flops <= result.budget < result.dense.flops
    x = image(case)
    with torch.no_grad():
        assert slim(x).shape == model(x).shape
    pooled, messages = pruned(model, tmp_path, ARGS, preserve="pooled", overwrite=True)
    assert not any("does not run" in one for one in messages)
    assert any(unit.layer == whole for unit in pooled.plan)


def test_indicators_behind_what_is_preserved_follow_the_budget_alone(tmp_path):
    result, _ = pruned(build(VIT), tmp_path, ARGS, preserve="blocks.0", allocation="indicator", steps=2)
    assert result.slim.flops <= result.budget
    assert {unit.layer for unit in result.plan} >= {"blocks.1.attn", "blocks.1.mlp"}


@pytest.mark.slow
@pytest.mark.parametrize("classes", [5, 100], ids=["fewer classes than features", "more"])
def test_pooled_features_do_not_learn_from_labels(tmp_path, classes):
    model = build(ModelCase(VIT.architecture, {**SMALL, "num_classes": classes}))
    images = image(VIT, batch=8), torch.arange(8) * 11 % classes
    given = {"preserve": "pooled", "allocation": "indicator", "steps": 2, "images": images, "eval_images": 0}
    much, none = (
        pruned(model, tmp_path, ARGS, label_weight=weight, dry_run=True, **given)[0] for weight in (9, 0)
    )
    assert [step.loss for step in much.log] == [step.loss for step in none.log]


def test_a_classifier_preserves_its_answers(tmp_path):
    model = build(ModelCase(VIT.architecture, SMALL))
    result, _ = pruned(model, tmp_path, ARGS)
    assert (result.metric, dict(result.preserved)) == ("answers", {"what": "answers"})
    assert result.plan.tokens.output_tokens == 1
    with safe_open(result.output, "pt") as file:
        assert "preserved" not in json.loads(file.metadata()["mhacut"])["history"][0]


@pytest.mark.slow
def test_dead_tokens_stay_where_their_features_are_preserved(tmp_path):
    model = build(ModelCase(VIT.architecture, SMALL))
    result, _ = pruned(model, tmp_path, ARGS, preserve="blocks.0, blocks.1")
    assert not result.plan.tokens
    assert dict(result.preserved) == {"what": "layers", "layers": ["blocks.0", "blocks.1"]}
    maps = result.model().forward_intermediates(image(VIT, batch=2), intermediates_only=True)
    assert len(maps) == SMALL["depth"]
    cut, _ = pruned(model, tmp_path, ARGS, overwrite=True)
    with pytest.raises(UnsupportedModelError, match=r"preserve='tokens'.*drops tokens.*keep_dead_tokens"):
        pruned(str(cut.output), tmp_path, preserve="tokens", output=tmp_path / "again.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["tokens", "blocks.0, blocks.1"])
def test_tokens_whose_features_are_preserved_merge_and_are_copied_back(tmp_path, what):
    """With no classifier and with one; in the file, in what is pruned from it, and exported."""
    args = {**SMALL, "img_size": 32, "num_classes": 0 if what == "tokens" else 5}
    model = build(ModelCase(VIT.architecture, args))
    merging = {"preserve": what, "exclude": ("*",), "heal_steps": 2, "tuning_steps": 1}
    result, messages = pruned(model, tmp_path, args, flops="80%", **merging)
    assert "scope: channels and token merging (merged tokens are copied back to their patches)" in "".join(
        messages
    )
    assert result.plan.tokens.unmerge
    slim, x = mhacut.load_model(result.output), image(ModelCase(VIT.architecture, args), batch=2)
    again = {"preserve": what, "scope": "attention+mlp", "output": tmp_path / "again.safetensors"}
    second, _ = pruned(str(result.output), tmp_path, flops="60%", **again)
    assert second.plan.tokens == result.plan.tokens
    mhacut.export(result.output, format="timm", output=tmp_path / "folder")
    backbone = timm.create_model(f"local-dir:{tmp_path / 'folder'}", features_only=True, pretrained=True)
    dense, twice = backbone.eval()(x), mhacut.load_model(second.output)
    for one in (slim, twice):
        assert one.forward_features(x).shape == model.forward_features(x).shape == (2, 17, 24)
    for one, other in zip(dense, slim.forward_intermediates(x, intermediates_only=True), strict=True):
        assert one.shape == (2, 24, 4, 4)
        torch.testing.assert_close(one, other)


def test_layers_that_do_not_exist_are_refused_with_their_neighbours(tmp_path):
    with pytest.raises(UsageError, match=r"preserve='blocks\.7': expected answers.*none.*blocks\.[01]"):
        pruned(build(VIT), tmp_path, ARGS, preserve="blocks.0,blocks.7")
    with pytest.raises(UsageError, match=r"'blocks\.0\.mlp\.fc1' may change its shape.*'blocks\.0\.mlp'"):
        pruned(build(VIT), tmp_path, ARGS, preserve="blocks.0.mlp.fc1")
    assert not list(tmp_path.iterdir())


PYRAMIDS = {
    **{
        name: CASES[name]
        for name in (
            "davit.WindowAttention",
            "gcvit.WindowAttentionGlobal",
            "tiny_vit.Attention, model",
            "edgenext.CrossCovarianceAttn, model",
            "maxxvit.AttentionCl, maxvit_rmlp_pico_rw_256",
            "metaformer.Attention",
            "swin_transformer.WindowAttention",
        )
    },
    # Its first stage has as many channels as rows and columns.
    "pvt_v2": CASES["pvt_v2.Attention"],
    "pvt_v2, of odd sizes": ModelCase(
        "pvt_v2_b0", {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 40, 64)}, (50, 84)
    ),
    "mobilevit": ModelCase("mobilevit_xxs", {}, 64),
}
"""Their stages give [B, C, H, W] around layers on other layouts, but for swin's."""


@pytest.mark.parametrize("name", PYRAMIDS)
@torch.no_grad()
def test_stages_give_the_channels_of_features_only(name):
    case = PYRAMIDS[name]
    model, x = build(case), image(case)
    modules = [each["module"] for each in model.feature_info]
    stages = find_layers(model, modules, find_prunable_layers(model), x[:1]).of(model, x)
    levels = find_pyramid(model, x[:1]).of(model, x)
    for number, (stage, level) in enumerate(zip(stages, levels, strict=True)):
        assert torch.equal(stage, level), number


def test_what_a_model_does_not_give_is_refused(tmp_path):
    with pytest.raises(
        UnsupportedModelError, match=re.escape("preserve='answers': the model has no classifier")
    ):
        pruned(build(VIT), tmp_path, ARGS, preserve="answers")
    model = build(VIT)
    model.feature_info = []
    with pytest.raises(UnsupportedModelError, match="no features_only"):
        find_pyramid(model, image(VIT, batch=1))
    swin = build(SWIN)
    with pytest.raises(UnsupportedModelError, match=r"windows for 1 images; name a block"):
        find_layers(swin, ["layers.0.blocks.0.attn"], find_prunable_layers(swin), image(SWIN, batch=1))
