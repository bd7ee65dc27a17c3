"""One budget for channels and tokens, end to end on a small ViT."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import mhacut
from helpers.jobs import Recorder, flops_limit, job_of
from helpers.models import ModelCase, build, image
from mhacut.measuring.predicted_time import TimeCurve
from mhacut.pruning.choose_merges import MergeSearch, tokens_of_model, with_all_merged
from mhacut.pruning.limits import Limit
from mhacut.pruning.merge_law import TYPICAL, Tokens, most_merged
from mhacut.pruning.preserve import Preserved
from mhacut.surgery.features import Features
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.tokens import merged_of

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
@pytest.mark.slow
def test_tokens_and_channels_share_a_budget(model, tmp_path):
    reporter, slim_file = Recorder(), tmp_path / "slim.safetensors"
    result = prune(model, slim_file, "50%", scope="attention+mlp+tokens", reporter=reporter)
    slim = mhacut.load_model(result.output)
    assert sum(result.plan.tokens.merged) > 0
    assert reporter.stages.count("cutting") == 1  # the plan counts merges, so there is nothing to correct
    assert 0.9 * result.budget <= result.slim.flops <= result.budget
    assert measure_flops(slim, (3, 96, 96)) == result.slim.flops
    assert slim(torch.randn(2, 3, 96, 96)).shape == (2, 10)


def test_schedules_go_from_no_merges_to_as_many_as_there_can_be(model):
    search = MergeSearch(job_of(model, image(VIT, batch=2), counted=True), None, TYPICAL)
    none, *some, most = search.schedules
    assert none == ()
    assert most == most_merged(search.tokens, search.last)
    assert len(some) > 5
    assert 0 < sum(some[0]) <= sum(some[-1]) <= sum(most)
    assert all(any(schedule) for schedule in some)


@torch.no_grad()
@pytest.mark.parametrize(("side", "most"), [(48, (4, 2, 1)), (96, (18, 9, 4)), (192, (72, 36, 18))])
def test_tokens_are_those_of_the_images(side, most):
    """Which are not always of the size that the model is built for."""
    model, size = build(ModelCase(VIT.architecture, {**ARGS, "dynamic_img_size": True})), (3, side, side)
    assert tokens_of_model(model, size) == Tokens((side // 16) ** 2 + 1, 1, 3)
    merging = with_all_merged(model, size)
    assert merged_of(merging) == most
    assert merging.forward_features(torch.zeros(1, *size)).shape[1] == (side // 16) ** 2 + 1 - sum(most)


def test_of_a_single_patch_nothing_is_merged():
    args = {"depth": 2, "embed_dim": 24, "num_heads": 3}
    one = build(ModelCase(VIT.architecture, {**args, "img_size": 16}))
    options = {"scope": "attention+mlp+tokens", "calibration_images": 4, "effort": "fast", "latency": False}
    result = mhacut.prune(one, flops="80%", model_args=args, dry_run=True, **options)
    assert result.plan.tokens.merged == ()
    assert result.slim.flops <= result.budget


def test_dense_features_have_merges_up_to_the_most(model):
    """Their divergence is far larger than that of answers; 4.9 is the level of a DINOv2-S."""
    preserved = Preserved("tokens", "dense", Features("tokens"))
    job = replace(job_of(model, image(VIT, batch=2), counted=True), unmerge=True, preserved=preserved)
    merged = [sum(each) for each in MergeSearch(job, None, TYPICAL._replace(level=4.9)).schedules]
    assert merged[-2] > 0.7 * merged[-1]


@pytest.mark.parametrize(
    ("share", "level", "merges"), [(0.8, 1.4, False), (0.8, -30.0, False), (0.05, 1.4, True)]
)
def test_merges_that_take_more_time_than_they_save_are_not_used(model, share, level, merges):
    """Unless channels alone miss the budget. The whole model has fewer FLOPs than the price of a merge."""
    job = job_of(model, image(VIT, batch=2), counted=True)
    curves = {
        unit.key: {width: 10 * (1 - width / unit.width) for width in job.choices[unit.key]}
        for unit in job.units
    }
    law = TYPICAL._replace(level=level)
    forced = MergeSearch(job, None, law).choose(flops_limit(job, share), curves)
    priced = MergeSearch(replace(job, merges_must_pay=True), None, law)
    assert any(forced.merged)
    assert any(priced.choose(flops_limit(job, share), curves).merged) == merges


def test_merges_of_negligible_gain_are_not_used(model):
    """Although they meet a measured time."""
    job = replace(job_of(model, image(VIT, batch=2), counted=True), merges_must_pay=True)
    dense = job.table.dense
    curve = TimeCurve.through([(dense // 2, 0.5), (dense, 1.0)], [(dense // 2, 0.5), (dense, 1.0)], 10**6)
    timed = (*flops_limit(job, 1), Limit(lambda widths: 0, 800_000, "max_latency", curve))

    def merged(gain):
        curves = {
            unit.key: {width: gain * (1 - width / unit.width) for width in job.choices[unit.key]}
            for unit in job.units
        }
        return MergeSearch(job, None, TYPICAL._replace(level=-30.0)).choose(timed, curves).merged

    assert any(merged(1.0))
    assert not any(merged(1e-8))


def test_few_merges_that_cannot_meet_a_time_are_not_chosen(model):
    job = job_of(model, image(VIT, batch=2), counted=True)
    search = MergeSearch(job, None, TYPICAL)
    # No model without merges meets half the time, however narrow; those that merge take the time of their
    # FLOPs.
    dense, most = job.table.dense, search.table(search.schedules[-1])
    curve = TimeCurve.through([(1, 0.6), (dense, 1.0)], [(1, 1 / dense), (dense, 1.0)], 10**6)
    timed = (*flops_limit(job, 1), Limit(lambda widths: 0, 500_000, "max_latency", curve))
    curves = {
        unit.key: {width: (1 - width / unit.width) ** 2 for width in job.choices[unit.key]}
        for unit in job.units
    }
    choice = search.choose(timed, curves)
    assert any(choice.merged)
    assert 0.4 * dense < choice.table.flops(choice.widths) <= 0.5 * dense
    least = {key: widths[0] for key, widths in job.allowed.items()}
    late = (*flops_limit(job, 1), Limit(lambda widths: 0, 1, "max_latency", curve))
    assert search.choose(late, curves).widths == least
    assert search.choose(late, curves).table.flops(least) == most.flops(least)
