"""Reconstruction of what a cut removes: bases, repair, channel scales, and what guards each."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call

from helpers.jobs import Recorder, job_of
from helpers.models import ModelCase, build, image, relative
from helpers.plans import distillation_of
from mhacut.options.prune import SearchOptions
from mhacut.plan import Plan
from mhacut.pruning.calibrate import calibrate
from mhacut.pruning.candidates import find_candidates
from mhacut.pruning.paper.indicators import with_trained_scales
from mhacut.pruning.repair import reconstruct
from mhacut.pruning.unit_moments import block_diagonal, rotated
from mhacut.surgery.channels import effective_output_weights
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.mask import masked_tensors
from mhacut.surgery.slice import cut
from properties.cases import VIT_PARAMS, VITS

TINY = ModelCase(
    "vit_tiny_patch16_224",
    {"depth": 2, "embed_dim": 24, "num_heads": 3, "img_size": 16, "patch_size": 8, "num_classes": 5},
)


class Bench:
    def __init__(self, case, basis, share=0.5, dtype=torch.float64, images=8):
        self.model = build(case, dtype=dtype).requires_grad_(False)
        self.images = image(case, batch=images, dtype=dtype)
        self.prunable = find_prunable_layers(self.model)
        self.calibration = calibrate(self.model, self.prunable, self.images, batch_size=8)
        self.candidates, plans = {}, []
        for unit in self.prunable.units():
            width = max(1, int(share * unit.width))
            module = self.model.get_submodule(unit.layer)
            moments = self.calibration.moments[unit.key]
            options = SearchOptions(basis=basis)
            self.candidates[unit.key] = find_candidates(module, unit, moments, width, options)
            plans.append(self.candidates[unit.key][0].plan(width))
        self.plan = Plan(tuple(plans))

    def reconstructed(self, **options):
        job = job_of(self.model, self.images, prunable=self.prunable, options=SearchOptions(**options))
        return reconstruct(job, self.calibration, self.plan, self.candidates)

    def slim(self, **options):
        ready = self.reconstructed(**options)
        slim = copy.deepcopy(ready.model)
        cut(slim, ready.plan, ready.channel_scales)
        return slim

    def distillation(self, model):
        return distillation_of(model, self.images)


@pytest.mark.parametrize("case", VIT_PARAMS)
@pytest.mark.parametrize(("repair", "basis"), [(True, "principal"), (False, "channel")])
def test_what_is_cut_computes_what_was_reconstructed(case, basis, repair):
    bench = Bench(case, basis, share=0.6)
    before = [tensor.clone() for tensor in bench.model.state_dict().values()]
    ready = bench.reconstructed(repair=repair)
    tensors = masked_tensors(ready.model, bench.prunable, ready.channel_scales)
    masked = functional_call(ready.model, tensors, (bench.images,))
    slim = copy.deepcopy(ready.model)
    cut(slim, ready.plan, ready.channel_scales)
    assert relative(slim(bench.images), masked) < 1e-8
    assert ready.plan.widths() == bench.plan.widths()
    assert {unit.basis for unit in ready.plan} <= {basis, "channel"}
    assert bool(ready.repairs) is repair
    after = bench.model.state_dict().values()
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_with_both_bases_every_unit_takes_that_which_leaves_less_on_held_out_images():
    both, left = Bench(TINY, "auto", images=24), {}
    ready = both.reconstructed()
    for basis in ("channel", "principal"):
        alone = Bench(TINY, basis, images=24)
        # Errors are shares of what plain removal costs, which depends on the basis.
        left[basis] = {unit.key: (unit, alone.reconstructed().repairs[unit.key].error) for unit in alone.plan}
    assert {unit.basis for unit in ready.plan} == {"channel", "principal"}
    for unit in ready.plan:
        expected, error = left[unit.basis][unit.key]
        assert unit == expected
        assert ready.repairs[unit.key].error == pytest.approx(error)


def test_repair_and_the_principal_basis_each_bring_the_model_nearer():
    # On images it was not fitted to.
    case = next(case for case in VITS.values() if case.architecture.startswith("deit3"))
    unseen, distance = image(case, batch=16, seed=5), {}
    for basis in ("channel", "principal"):
        bench = Bench(case, basis, dtype=torch.float32, images=32)
        for repair in (True, False):
            slim = bench.slim(repair=repair)
            distance[basis, repair] = float((slim(unseen) - bench.model(unseen)).norm())
    assert distance["channel", True] < distance["channel", False]
    assert distance["principal", True] < distance["principal", False]
    assert distance["principal", True] < distance["channel", True]


# --- channel scales on the slim model ---


@pytest.fixture(scope="module")
def bench():
    return Bench(TINY, "auto", share=0.6, dtype=torch.float32, images=16)


def test_scales_that_help_are_merged(bench):
    slim = bench.slim(repair=False).requires_grad_(False)
    before = copy.deepcopy(slim.state_dict())
    reporter, distillation = Recorder(), bench.distillation(bench.model)
    options = {"steps": 40, "lr": 0.01, "reporter": reporter}
    scaled = with_trained_scales(slim, find_prunable_layers(slim), distillation, **options)
    assert distillation.divergence_of(scaled) < 0.9 * distillation.divergence_of(slim)
    assert all(torch.equal(tensor, before[name]) for name, tensor in slim.state_dict().items())
    assert {name: tensor.shape for name, tensor in scaled.state_dict().items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    assert reporter.steps == [(step + 1, 40) for step in range(40)]


# --- without a repair ---


def test_principal_channels_keep_the_dense_temperature():
    """What is left of the logits is nearest to them as it is: 1/sqrt(kept width) would inflate it."""
    bench = Bench(TINY, "principal")
    channel_scales = bench.reconstructed(repair=False).channel_scales
    assert all(channel_scales[unit.key].max() == 1 for unit in bench.prunable.units(["qk"]))
    plain = Bench(TINY, "channel")
    channel_scales = plain.reconstructed(repair=False).channel_scales
    assert all(channel_scales[unit.key].max() > 1.3 for unit in plain.prunable.units(["qk"]))


@pytest.mark.parametrize("case", VIT_PARAMS)
def test_without_repair_channels_go_by_what_goes_with_them(case):
    """The first to go is the channel whose removal moves its head's part of the output (or logits) least."""
    bench = Bench(case, "channel", images=16)
    for unit in bench.prunable.units():
        module, seen = bench.model.get_submodule(unit.layer), bench.calibration.moments[unit.key]
        options = SearchOptions(basis="channel", positions="own", repair=False)
        (candidate,) = find_candidates(module, unit, seen, 1, options)
        if unit.kind == "qk":
            query, key = seen.every
            lost = [(query.energy * key.energy)[head].diagonal() for head in range(unit.heads)]
        else:
            each = effective_output_weights(module, unit).square().sum(0) * seen.every[0].energy.diagonal()
            lost = each.view(unit.heads, unit.width)
        for head in range(unit.heads):
            assert int(candidate.ranking.order[head, -1]) == int(lost[head].argmin())


def test_without_a_repair_principal_channels_hold_means_too():
    """No bias takes up what removed channels give on average, so that it counts when a basis is chosen."""
    bench = Bench(TINY, "channel", images=16)
    unit = bench.prunable.units(["v"])[0]
    module, seen = bench.model.get_submodule(unit.layer), bench.calibration.moments[unit.key]
    second, columns = seen.every[0].energy, effective_output_weights(module, unit)
    lost = []
    for refit in (True, False):
        options = SearchOptions(basis="principal", repair=refit)
        (candidate,) = find_candidates(module, unit, seen, 1, options)
        turned = rotated(seen, unit, candidate.rotation).every[0].energy
        gone = torch.cat([head * unit.width + torch.arange(2, unit.width) for head in range(unit.heads)])
        reader = (columns @ block_diagonal(candidate.rotation).mT)[:, gone]
        blocks = (reader.mT @ reader * turned[gone][:, gone]).view(unit.heads, unit.width - 2, unit.heads, -1)
        lost.append(sum(float(blocks[head, :, head].sum()) for head in range(unit.heads)))
    assert seen.every[0].mean.norm() > 0.1 * second.diagonal().sum().sqrt()  # else nothing is tested
    assert lost[1] < 0.999 * lost[0]
