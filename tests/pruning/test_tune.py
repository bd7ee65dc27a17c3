"""Tuning of all weights: it helps, reads the images that lie there, and is refused where it harms."""

from __future__ import annotations

import copy
import hashlib
import re
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import mhacut
from helpers.healing import VIT, Bench
from helpers.jobs import Recorder, job_of
from mhacut.options.prune import SearchOptions
from mhacut.pruning import job, recover, tune
from mhacut.surgery.hooks import captured_outputs
from mhacut.surgery.merging_blocks import unmerged

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
CRUDE = {
    "flops": "7%",
    "repair": False,
    "reweight": False,
    "heal_steps": 0,
    "calibration_images": 64,
    "eval_images": 0,
    "latency": False,
    "workers": 0,
    "tuning_lr": 1e-4,
}
"""Options that leave a loss which tuning can mend."""


def pruned(output, images=DIGITS / "images", **options):
    recorder = Recorder()
    given = {**CRUDE, **options, "reporter": recorder}
    result = mhacut.prune(DIGITS / "model", data_dir=images, output=output, **given)
    return result, [line for line in recorder.messages if line.startswith(("healing", "tuning"))]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return pruned(tmp_path_factory.mktemp("tuned") / "slim.safetensors", tuning_steps=45)


@pytest.mark.slow
def test_tuning_brings_outputs_nearer_to_the_dense_model(tuned, tmp_path):
    result, (steps, line) = tuned
    plain, nothing = pruned(tmp_path / "plain.safetensors", tuning_steps=0)
    assert not nothing
    assert "45 steps, each with 16 of 284 images" in steps  # 300 less those held out of the 64
    assert result.divergence < 0.8 * plain.divergence
    before, after = map(float, re.search(r"held-out images (\S+) before, (\S+) after", line).groups())
    assert before > max(after, 1.1 * plain.divergence)  # on crops, of which the model knows less


@pytest.mark.exhaustive
def test_the_same_seed_gives_the_same_bytes(tuned, tmp_path):
    again, _ = pruned(tmp_path / "again.safetensors", tuning_steps=45, workers=2)
    assert digest(again.output) == digest(tuned[0].output)


def tiny(**options):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=9)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    recorder, images = Recorder(), torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    options = {"calibration_images": 8, "dry_run": True, "scope": "attention+mlp", "flops": "30%"} | options
    given = options.pop("given", lambda images: images)(images)
    mhacut.prune(model, images=given, reporter=recorder, **{**CRUDE, **options})
    return recorder.messages


@pytest.mark.slow
@pytest.mark.parametrize("given", [lambda images: images, lambda images: DataLoader(list(images), 5, True)])
def test_all_images_in_memory_are_read_by_no_other_process(monkeypatch, given):
    monkeypatch.setattr(BaseProcess, "start", lambda process: pytest.fail("a process was started"))
    messages = tiny(given=given, workers=None, tuning_steps=1)
    assert any("tuning all weights: 1 steps, each with 16 of 18 images, about " in line for line in messages)


@pytest.mark.exhaustive
def test_class_tokens_of_every_block_come_nearer_to_the_dense_ones(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "HINTS", 0.0)
    plain, _ = pruned(tmp_path / "plain.safetensors", tuning_steps=45)
    images, tokens = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0)), []
    for model in (mhacut.load_model(DIGITS / "model"), tuned[0].model(), plain.model()):
        with captured_outputs(model, ["blocks.1"]) as outputs, torch.no_grad():
            model.eval()(images)
        tokens.append(unmerged(outputs["blocks.1"][0])[:, 0])
    dense, hinted, plain = tokens
    assert F.mse_loss(hinted, dense) < 0.95 * F.mse_loss(plain, dense)


@pytest.mark.slow
def test_tuning_that_harms_is_left_out(tmp_path):
    plain, _ = pruned(tmp_path / "plain.safetensors", tuning_steps=0)
    same, (_, line) = pruned(tmp_path / "same.safetensors", tuning_steps=4, tuning_lr=0.1)
    assert line.startswith("tuning rejected")
    assert same.divergence == plain.divergence


@pytest.mark.slow
def test_weights_before_healing_are_tuned_if_healed_weights_gain_nothing(tmp_path, monkeypatch):
    started = []

    def harmful(slim, *given):
        started.append(slim)
        broken = copy.deepcopy(slim)
        torch.nn.init.zeros_(broken.head.weight)
        return broken

    monkeypatch.setattr(recover, "tuned", harmful)
    given = {"heal_steps": 20, "tuning_steps": 1}
    _, lines = pruned(tmp_path / "slim.safetensors", **given)
    assert [line.partition(":")[0] for line in lines] == [
        "healing accepted",
        "tuning rejected",
        "tuning without healing rejected",
    ]
    healed, before = (slim.blocks[0].mlp.fc2.weight for slim in started)
    assert not torch.equal(healed, before)


@pytest.mark.exhaustive
def test_the_second_attempt_equals_tuning_without_healing(tmp_path, monkeypatch):
    real, starts = recover.tuned, []

    def first_fails(slim, *given):
        starts.append(slim)
        trained = real(slim, *given)
        if len(starts) == 1:
            torch.nn.init.zeros_(trained.head.weight)
        return trained

    plain, _ = pruned(tmp_path / "plain.safetensors", tuning_steps=45)
    monkeypatch.setattr(recover, "tuned", first_fails)
    again, lines = pruned(tmp_path / "again.safetensors", heal_steps=20, tuning_steps=45)
    assert lines[-1].startswith("tuning without healing accepted")
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("plain", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.divergence == plain.divergence


@pytest.mark.exhaustive
def test_features_of_all_tokens_are_tuned_and_not_healed(tmp_path):
    given = {"preserve": "tokens", "flops": "50%", "tuning_lr": None}
    plain, _ = pruned(tmp_path / "plain.safetensors", **given, tuning_steps=0)
    tuned, said = pruned(tmp_path / "tuned.safetensors", **given, heal_steps=None)
    assert tuned.divergence < 0.9 * plain.divergence
    assert not any(line.startswith("healing") for line in said)


def test_the_best_step_is_where_a_parabola_is_lowest():
    weight = torch.tensor([3.0, -2.0], dtype=torch.float64, requires_grad=True)
    given, curvature = weight.detach().clone(), torch.tensor([1.0, 4.0], dtype=torch.float64)

    def loss(x):
        return (curvature * x**2).sum()

    found = tune.best_step(lambda: loss(weight), [weight])
    torch.testing.assert_close(weight.detach(), given)
    losses = [loss(given - step * given.sign()) for step in (0.99 * found, found, 1.01 * found)]
    assert losses[1] == min(losses)


@pytest.mark.exhaustive
def test_nothing_is_trained_where_nothing_is_lost(tmp_path):
    given = {"flops": "50%", "repair": True, "heal_steps": None}
    assert not pruned(tmp_path / "slim.safetensors", **given)[1]
    assert pruned(tmp_path / "asked.safetensors", **given, tuning_steps=1)[1]


def test_models_share_what_the_dense_model_gives():
    bench, options = Bench(VIT, dtype=torch.float32), SearchOptions(tuning_steps=3, batch_size=5)
    shared = replace(job_of(bench.dense, bench.images, options=options), teacher_cache=[])
    first, again = (tune.tuned(bench.slim, shared, bench.calibration, 1.0).head.weight for _ in range(2))
    assert torch.equal(first, again)
    shared.teacher_cache[:] = [(-outputs, tokens) for outputs, tokens in shared.teacher_cache]
    assert not torch.equal(first, tune.tuned(bench.slim, shared, bench.calibration, 1.0).head.weight)


@pytest.mark.slow
def test_a_model_is_tuned_by_a_calibration_that_was_stored(monkeypatch):
    """It measures answers by an equal object, not by the same one."""
    calibrate = job.calibrate
    monkeypatch.setattr(job, "calibrate", lambda *given, **how: copy.deepcopy(calibrate(*given, **how)))
    messages = tiny(effort="balanced")
    assert any(message.startswith("tuning all weights") for message in messages)
