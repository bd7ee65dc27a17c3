"""Sensitivity curves against what a unit's cut and refit really leaves, weighted by Fisher information."""

from __future__ import annotations

import copy
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.jobs import Recorder, job_of
from helpers.models import ModelCase, build, image
from mhacut.linalg.reconstruction import RIDGES
from mhacut.options.prune import SearchOptions, Work
from mhacut.plan import Plan
from mhacut.pruning import curves as module_under_test
from mhacut.pruning.calibrate import calibrate
from mhacut.pruning.candidates import find_candidates
from mhacut.pruning.curves import MAX_WIDTHS, sensitivity_curves
from mhacut.pruning.limits import width_choices
from mhacut.pruning.repair import plan_channel_scales, shrink
from mhacut.surgery.channels import rotate
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.mask import masked_tensors

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 3, "img_size": 16, "patch_size": 8, "num_classes": 5}
CASES = (
    ModelCase("vit_tiny_patch16_224", SMALL),
    ModelCase("vit_tiny_patch16_224", {**SMALL, "qk_norm": True, "qkv_bias": False}),
    ModelCase("beit3_base_patch16_224", SMALL),
)
IMAGES = 120  # so many that no unit has few rows for its channels


def curves_on_all_images(job, calibration, candidates):
    with patch.object(SearchOptions, "work", Work(0, 0, 0, replayed_images=len(job.images))):
        return sensitivity_curves(job, calibration, candidates)


class Curved:
    def __init__(self, case, basis, round_to=2, refit=True):
        self.model = build(case, dtype=torch.float64).requires_grad_(False)
        self.prunable = find_prunable_layers(self.model)
        self.images = image(case, batch=IMAGES, dtype=torch.float64)
        self.calibration = calibrate(
            self.model, self.prunable, self.images, batch_size=IMAGES, fisher_images=IMAGES
        )
        self.reporter, options = Recorder(), SearchOptions(basis=basis, repair=refit)
        self.job = job_of(
            self.model,
            self.images,
            prunable=self.prunable,
            round_to=round_to,
            options=options,
            reporter=self.reporter,
        )
        self.choices = self.job.choices
        self.candidates = {
            unit.key: find_candidates(
                self.model.get_submodule(unit.layer),
                unit,
                self.calibration.moments[unit.key],
                self.choices[unit.key][0],
                options,
                self.calibration.fisher.matrices[unit.layer],
            )[0]
            for unit in self.job.units
        }
        self.curves = curves_on_all_images(self.job, self.calibration, self.candidates)

    def layer_output(self, model, layer):
        seen = []
        handle = model.get_submodule(layer).register_forward_hook(lambda m, i, o: seen.append(o))
        model(self.images)
        handle.remove()
        return seen[0]

    def divergence(self, unit, errors):
        """1/2 e^T F e, mean over rows, each of which counts as much as its token."""
        flat = errors.flatten(0, -2)
        each = (flat @ self.calibration.fisher.matrices[unit.layer] * flat).sum(-1)
        return float(self.weights(unit, flat) @ each) / len(flat) / 2

    def weights(self, unit, rows):
        grid = (IMAGES, len(rows) // IMAGES)
        weights = self.calibration.fisher.token_importance(unit.layer, grid, IMAGES)
        assert weights.std() > 0.1  # else they are not tested
        return weights


@pytest.fixture(scope="module", params=["channel", "principal"])
def basis(request):
    return request.param


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.id + str("qk_norm" in case.args))
def it(request, basis):
    return Curved(request.param, basis)


def test_every_unit_has_an_error_at_every_choice_falling_to_nothing(it):
    assert set(it.curves) == {unit.key for unit in it.prunable.units()}
    for key, curve in it.curves.items():
        assert tuple(curve) == it.choices[key]
        errors = list(curve.values())
        assert errors[-1] == 0
        assert all(error > 0 for error in errors[:-1])
        assert errors == sorted(errors, reverse=True)


def test_errors_of_outputs_are_those_of_explicit_least_squares(it):
    for unit in it.prunable.units(["v", "hidden"]):
        model, candidate = copy.deepcopy(it.model), it.candidates[unit.key]
        layer = model.get_submodule(unit.layer)
        if candidate.rotation is not None:
            rotate(layer, unit, candidate.rotation)
        reader, seen = layer.get_submodule(unit.output_projection.tensor.rpartition(".")[0]), []
        reader.register_forward_pre_hook(lambda m, i, seen=seen: seen.append(i[0].flatten(0, -2)))
        model(it.images)
        x = seen[0]  # every row that the unit's channels were read from
        checked = 0
        for width in (choice for choice in it.choices[unit.key] if choice in sampled(it, unit)):
            heads = unit.width * torch.arange(unit.heads)[:, None]
            kept = (candidate.ranking.kept(width) + heads).flatten()
            inputs = x[:, kept]
            if unit.output_bias is not None:
                inputs = torch.cat([inputs, torch.ones(len(x), 1).double()], 1)
            share = it.weights(unit, x).sqrt()[:, None]
            predicted = inputs @ torch.linalg.lstsq(share * inputs, share * x, driver="gelsd").solution
            left = it.divergence(unit, (x - predicted) @ reader.weight.T)
            curve = it.curves[unit.key]
            # Activations were multiplied in float32.
            assert curve[width] == pytest.approx(left, rel=2e-3, abs=1e-6 * max(curve.values()))
            checked += 1
        assert checked > 2


def test_errors_without_a_repair_are_those_of_dead_channels(basis):
    it = Curved(CASES[0], basis, refit=False)
    for unit in it.prunable.units():
        dense = it.layer_output(it.model, unit.layer)
        candidate, width = it.candidates[unit.key], it.choices[unit.key][0]
        plan = Plan((candidate.plan(width),))
        model = copy.deepcopy(it.model)
        if candidate.rotation is not None:
            rotate(model.get_submodule(unit.layer), unit, candidate.rotation)
        tensors = masked_tensors(model, it.prunable, plan_channel_scales(it.prunable, plan, None))
        model.load_state_dict({**model.state_dict(), **tensors})
        left = it.divergence(unit, it.layer_output(model, unit.layer) - dense)
        assert it.curves[unit.key][width] == pytest.approx(left, rel=2e-3)


def test_few_rows_are_judged_by_images_held_back(monkeypatch):
    monkeypatch.setattr("mhacut.pruning.candidates.FEW_ROWS", 1000)
    it = Curved(CASES[0], "channel")
    for unit in it.prunable.units(["v", "hidden"]):
        layer, seen = it.model.get_submodule(unit.layer), []
        reader = layer.get_submodule(unit.output_projection.tensor.rpartition(".")[0])
        handle = reader.register_forward_pre_hook(lambda m, i, seen=seen: seen.append(i[0].flatten(0, -2)))
        it.model(it.images)
        handle.remove()
        x, weights = seen[0], it.weights(unit, seen[0])
        held = it.calibration.held * len(x) // IMAGES
        fit, share = x[held:], weights[held:, None]
        mean = (share * fit).mean(0)
        covariance = (share * (fit - mean)).mT @ (fit - mean) / len(fit)
        width = it.choices[unit.key][1]
        heads = unit.width * torch.arange(unit.heads)[:, None]
        kept = (it.candidates[unit.key].ranking.kept(width) + heads).flatten()
        block, errors = covariance[kept][:, kept], []
        for ridge in (*RIDGES, 1e12):
            damped = block + ridge * block.diagonal().mean() * torch.eye(len(kept)).double()
            predicted = mean + (x[:held, kept] - mean[kept]) @ torch.linalg.solve(damped, covariance[kept])
            predicted[:, kept] = x[:held, kept]
            moved = (x[:held] - predicted) @ reader.weight.T
            each = (moved @ it.calibration.fisher.matrices[unit.layer] * moved).sum(-1)
            errors.append(float(weights[:held] @ each) / held / 2)
        assert it.curves[unit.key][width] == pytest.approx(min(errors), rel=2e-3)


def pooling_head(kind, images, basis):
    case = ModelCase("vit_base_patch16_siglip_224", {**SMALL, "embed_dim": 48})
    model = build(case, dtype=torch.float64).requires_grad_(False)
    prunable, images = find_prunable_layers(model), image(case, batch=images, dtype=torch.float64)
    unit = prunable.unit(("attn_pool", kind))
    calibration = calibrate(model, prunable, images, batch_size=len(images), fisher_images=len(images))
    fisher, seen = calibration.fisher.matrices["attn_pool"], calibration.moments[unit.key]
    job = job_of(model, images, round_to=1, options=SearchOptions(basis=basis))
    (candidate, *_) = find_candidates(model.attn_pool, unit, seen, 1, job.options, fisher)
    return unit, job, calibration, candidate


def test_no_channel_of_a_pooling_head_is_free_for_want_of_images():
    """It sees one row an image; so many channels as rows foretell all others of those images."""
    unit, job, calibration, candidate = pooling_head("v", 32, "principal")
    curve = sensitivity_curves(job, calibration, {unit.key: candidate})[unit.key]
    assert calibration.moments[unit.key].fit[0].rows == 24 < 3 * 12
    assert curve[12] > 0.01 * curve[1] > 0


@pytest.mark.slow
@torch.no_grad()
def test_errors_of_a_pooling_head_are_those_before_its_mlp():
    unit, job, calibration, candidate = pooling_head("qk", 400, "channel")
    curve = curves_on_all_images(job, calibration, {unit.key: candidate})[unit.key]
    model, images, fisher = job.model, job.images, calibration.fisher.matrices["attn_pool"]
    shrunk, given = copy.deepcopy(model), []
    shrink(shrunk.attn_pool, unit, candidate, 1, calibration.moments[unit.key])
    for each in (model, shrunk):
        each.attn_pool.proj.register_forward_hook(lambda m, i, output: given.append(output[:, 0]))
    logs = [each(images).log_softmax(-1) for each in (model, shrunk)]
    moved = given[1] - given[0]
    assert curve[1] == pytest.approx(float((moved @ fisher * moved).sum(-1).mean()) / 2, rel=1e-6)
    true = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    assert 0.3 * true < curve[1] < 3 * true


def sampled(it, unit):
    """Between the others, curves are interpolated."""
    choices = it.choices[unit.key]
    return choices if unit.kind == "hidden" else module_under_test.sampled_widths(choices)


def test_errors_of_logits_are_those_of_the_layer_cut(it):
    for unit in it.prunable.units(["qk"]):
        dense = it.layer_output(it.model, unit.layer)
        for width in it.choices[unit.key][:-1]:
            model = copy.deepcopy(it.model)
            layer = model.get_submodule(unit.layer)
            shrink(layer, unit, it.candidates[unit.key], width, it.calibration.moments[unit.key])
            errors = it.layer_output(model, unit.layer) - dense
            # The least of it and of narrower widths: curves never rise.
            least = min(it.curves[unit.key][other] for other in it.choices[unit.key] if other <= width)
            assert it.curves[unit.key][width] == least
            assert it.curves[unit.key][width] <= it.divergence(unit, errors) * (1 + 1e-6)
        width = it.choices[unit.key][0]
        shrunk = copy.deepcopy(it.model)
        layer = shrunk.get_submodule(unit.layer)
        shrink(layer, unit, it.candidates[unit.key], width, it.calibration.moments[unit.key])
        errors = it.layer_output(shrunk, unit.layer) - dense
        assert it.curves[unit.key][width] == pytest.approx(it.divergence(unit, errors), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[0], CASES[2]])
def test_a_small_batch_size_bounds_the_images_that_are_run_at_once(case):
    it, seen = Curved(case, "channel"), []
    job = replace(it.job, options=replace(it.job.options, batch_size=5))
    with it.model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0]))):
        found = curves_on_all_images(job, it.calibration, it.candidates)
    assert seen == [10] * (IMAGES // 10)
    for key, curve in it.curves.items():
        assert found[key] == pytest.approx(curve, rel=1e-9, abs=1e-18)


@given(last=st.integers(1, 60), step=st.integers(1, 8))
def test_few_widths_are_measured_and_the_ends_are_among_them(last, step):
    choices = width_choices(last, step)
    chosen = module_under_test.sampled_widths(choices)
    assert len(chosen) <= MAX_WIDTHS
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(choices)
    assert (chosen[0], chosen[-1]) == (choices[0], choices[-1])
    assert len(choices) > MAX_WIDTHS or tuple(chosen) == choices


@given(data=st.data())
def test_between_measured_widths_the_error_lies_between_theirs(data):
    choices = width_choices(data.draw(st.integers(2, 40)), data.draw(st.integers(1, 4)))
    inner = data.draw(st.sets(st.sampled_from(choices)))
    known = sorted(inner | {choices[0], choices[-1]})
    errors = data.draw(st.lists(st.floats(1e-9, 1e3), min_size=len(known), max_size=len(known)))
    sampled = dict(zip(known, [*sorted(errors, reverse=True)[:-1], 0.0], strict=True))
    curve = module_under_test._interpolated(sampled, choices)
    assert tuple(curve) == choices
    assert all(curve[width] == pytest.approx(sampled[width]) for width in known)
    assert list(curve.values()) == sorted(curve.values(), reverse=True)
