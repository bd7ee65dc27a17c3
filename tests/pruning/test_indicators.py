"""Indicators on a small model: their promises, and that each ingredient has an effect."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from helpers.jobs import flops_limit, job_of
from helpers.models import SMALL, ModelCase, build, image, relative
from mhacut.errors import MhacutError
from mhacut.options.prune import EFFORTS, PruneOptions, SearchOptions
from mhacut.plan import UNIT_KINDS
from mhacut.pruning.calibrate import calibrate
from mhacut.pruning.paper.indicators import search
from mhacut.pruning.paper.statistics import cosine_similarity, logit_energy, redundancy
from mhacut.pruning.preserve import ANSWERS
from mhacut.pruning.repair import plan_channel_scales
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.mask import masked_tensors
from mhacut.surgery.slice import cut

WIDE = ModelCase("vit_tiny_patch16_224", SMALL)
"""Heads of 64 channels."""
SHORT = SearchOptions(steps=5, gain_steps=3, batch_size=4, allocation="indicator")


class Bench:
    def __init__(self, images=12):
        self.model, self.images = build(WIDE).requires_grad_(False), image(WIDE, batch=images)
        self.dense_job = job_of(self.model, self.images, counted=True)
        self.prunable, self.table = self.dense_job.prunable, self.dense_job.table
        self.calibration = calibrate(self.model, self.prunable, self.images, batch_size=5)

    def job(self, options=SHORT, labels=None, kinds=UNIT_KINDS):
        units = self.prunable.units(kinds)
        return replace(self.dense_job, options=options, labels=labels, units=units)

    def search(self, share=0.6, options=SHORT, **more):
        job = self.job(options, **more)
        return self.searched(job, share, job.distillation(self.calibration))

    def searched(self, job, share, distillation):
        plan, channel_scales, log = search(job, flops_limit(job, share), self.calibration, distillation)
        return SimpleNamespace(plan=plan, channel_scales=channel_scales, log=log)

    def slim(self, share, options=SHORT):
        found = self.search(share, options)
        trained = found.channel_scales if options.reweight else None
        channel_scales = plan_channel_scales(self.prunable, found.plan, trained)
        slim = copy.deepcopy(self.model)
        cut(slim, found.plan, channel_scales)
        return found.plan, channel_scales, slim


@pytest.fixture(scope="module")
def bench():
    return Bench()


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_the_budget_is_met_and_used(bench, share):
    found = bench.search(share)
    flops = bench.table.flops(found.plan.widths())
    assert 0.99 * share * bench.table.dense <= flops <= share * bench.table.dense
    assert all(unit.width % 8 == 0 or unit.keeps_all for unit in found.plan)


def test_the_budget_weighs_as_much_beside_a_large_loss_as_beside_a_small_one(bench):
    options = replace(SHORT, reweight=False)  # scales are trained by the loss alone
    found, job = bench.search(0.5, options), bench.job(options)
    louder = job.distillation(bench.calibration)
    masked_loss = louder.masked_loss
    louder.masked_loss = lambda *args: 4096 * masked_loss(*args)
    again = bench.searched(job, 0.5, louder)
    assert [step.flops for step in again.log] == [step.flops for step in found.log]
    assert again.plan == found.plan


def test_what_was_trained_is_what_is_cut(bench):
    plan, channel_scales, slim = bench.slim(0.5)
    tensors = masked_tensors(bench.model, bench.prunable, channel_scales)
    masked = functional_call(bench.model, tensors, (bench.images,))
    assert relative(slim(bench.images), masked) < 1e-4
    assert measure_flops(slim, WIDE.size) == bench.table.flops(plan.widths())


def test_the_dense_model_is_left_as_it_was(bench):
    before = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
    bench.search(0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bench.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in bench.model.parameters())


def test_the_same_seed_gives_the_same_plan_and_another_may_not(bench):
    first, second = bench.search(0.5), bench.search(0.5)
    assert first.plan == second.plan
    assert all(
        torch.equal(first.channel_scales[key], second.channel_scales[key]) for key in first.channel_scales
    )
    assert [step.loss for step in first.log] == [step.loss for step in second.log]
    other = bench.search(0.5, replace(SHORT, seed=7))
    assert [step.loss for step in other.log] != [step.loss for step in first.log]


@pytest.mark.parametrize(
    "change",
    [{"similarity": False}, {"score_adjustment": False}, {"init": "uniform"}, {"reweight": False}],
    ids=str,
)
def test_every_ingredient_can_be_switched_off_and_does_something(bench, change):
    (plan, channel_scales, _), (other_plan, other_gains, _) = (
        bench.slim(0.5),
        bench.slim(0.5, replace(SHORT, **change)),
    )
    same_gains = all(torch.equal(channel_scales[key], other_gains[key]) for key in channel_scales)
    assert not (plan == other_plan and same_gains)


def test_scales_are_trained_as_long_as_asked_or_as_the_effort_says():
    assert [SearchOptions(effort=effort).trained_gain_steps for effort in EFFORTS] == [0, 0, 0]
    assert SearchOptions(repair=False).trained_gain_steps == 40
    assert SearchOptions(effort="fast", gain_steps=7).trained_gain_steps == 7
    assert SearchOptions(gain_steps=0).trained_gain_steps == 0
    assert SearchOptions(gain_steps=7, reweight=False).trained_gain_steps == 0


def test_the_papers_method_is_a_preset_that_other_options_override():
    given = {"checkpoint": "vit.safetensors", "flops": "50%", "method": "paper"}
    search = PruneOptions.of(**given)
    assert (search.allocation, search.selection) == ("indicator", "indicator")
    assert not search.repair
    assert (search.healed_steps, search.trained_gain_steps) == (0, 40)
    assert PruneOptions.of(**given, repair=True).repair


def test_the_scope_is_kept(bench):
    found = bench.search(0.85, kinds=("qk", "v"))
    assert {unit.kind for unit in found.plan} == {"qk", "v"}


@pytest.mark.slow
def test_training_helps():
    bench = Bench(images=16)
    outcomes = []
    for steps in (1, 60):
        _, _, slim = bench.slim(0.4, SearchOptions(steps=steps, batch_size=8))
        outcomes.append(float(ANSWERS.divergence(slim(bench.images), bench.calibration.teacher)))
    assert outcomes[1] < 0.7 * outcomes[0]


def test_statistics_equal_those_of_hooks_by_hand():
    model, images = build(WIDE), image(WIDE, batch=7)
    prunable = find_prunable_layers(model)
    whole = calibrate(model, prunable, images, batch_size=7)
    seen = {}
    model.blocks[1].attn.qkv.register_forward_hook(lambda m, i, o: seen.update(qkv=o))
    model.blocks[1].attn.proj.register_forward_pre_hook(lambda m, i: seen.update(out=i[0]))
    with torch.no_grad():
        teacher = model(images)
    q, k, v = seen["qkv"].double().reshape(7, -1, 3, 3, 64).permute(2, 0, 3, 1, 4)

    def gram(x):  # (B, H, N, d)
        flat = x.transpose(0, 1).flatten(1, 2)
        return flat.transpose(-2, -1) @ flat

    qk, value = whole.statistics["blocks.1.attn", "qk"], whole.statistics["blocks.1.attn", "v"]
    centred = k - k.mean(2, keepdim=True)  # softmax ignores what is constant over the keys
    expected = redundancy(cosine_similarity(gram(q)), cosine_similarity(gram(centred)))
    assert torch.allclose(qk.redundancy, expected, atol=1e-5)
    assert torch.allclose(qk.difference, logit_energy(q, k).sqrt(), rtol=1e-5)
    assert torch.allclose(value.redundancy, redundancy(cosine_similarity(gram(v))), atol=1e-5)
    columns = model.blocks[1].attn.proj.weight.double().norm(dim=0).reshape(3, 64)
    norms = seen["out"].double().reshape(-1, 3, 64).norm(dim=0)
    assert torch.allclose(value.difference, columns * norms, rtol=1e-4)
    assert torch.allclose(whole.teacher, teacher, atol=1e-5)


def test_a_search_that_diverges_is_an_error(bench):
    options = replace(SHORT, gain_lr=1e36)
    with pytest.raises(MhacutError, match=r"step 2: .*not finite.* smaller lr=0.01 or gain_lr=1e\+36$"):
        bench.search(0.5, options)
    bench.search(0.5, replace(options, reweight=False))


def test_cross_entropy_uses_the_labels_of_the_batch(bench):
    labels = bench.calibration.teacher.argmax(-1)
    right = bench.search(0.9, replace(SHORT, label_weight=1.0), labels=labels).log[0].loss
    wrong = bench.search(0.9, replace(SHORT, label_weight=1.0), labels=(labels + 1) % 7).log[0].loss
    assert right < wrong
    assert right >= float(F.cross_entropy(bench.calibration.teacher, labels)) * 0.5
