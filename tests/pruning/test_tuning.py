"""Tuning all weights of a slim model with the dense one as teacher."""

from __future__ import annotations

import copy
import math
import re
from itertools import pairwise

import pytest
import timm
import torch

from helpers.jobs import Recorder
from helpers.plans import distillation_of
from mhacut.options.prune import SearchOptions
from mhacut.pruning.augment import varied
from mhacut.pruning.channel_scales import with_trained_scales
from mhacut.pruning.distill import Distillation, minimise
from mhacut.pruning.recover import Recovery
from mhacut.pruning.tune import tuned
from mhacut.surgery.find import find_prunable_layers


@pytest.fixture
def dense():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=1, embed_dim=24, num_heads=2, num_classes=5
    )
    torch.nn.init.normal_(model.head.weight)
    return model.eval().requires_grad_(False)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def damaged(dense):
    slim = copy.deepcopy(dense)
    slim.blocks[0].mlp.fc2.weight += 0.05 * torch.randn(
        slim.blocks[0].mlp.fc2.weight.shape, generator=torch.Generator().manual_seed(1)
    )
    return slim


def test_tuning_comes_nearer_to_the_dense_model_on_images_it_has_not_seen(dense):
    images = torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    slim = damaged(dense)
    before = {name: tensor.clone() for name, tensor in slim.state_dict().items()}
    distillation, judge = distillation_of(dense, images[16:]), distillation_of(dense, images[:16])
    reporter = Recorder()
    model = tuned(slim, dense, distillation, steps=30, lr=1e-3, reporter=reporter)
    found = Recovery.of(slim, model, judge)
    assert reporter.steps == [(step, 30) for step in range(1, 31)]
    assert all(re.fullmatch(r"loss \d\.\d{4}", detail) for detail in reporter.details)
    assert found.after < 0.7 * found.before
    assert found.after == pytest.approx(judge.divergence_of(found.model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in slim.state_dict().items())
    assert not any(parameter.requires_grad for parameter in found.model.parameters())


def test_learning_rates_fall_to_0_along_a_cosine():
    """Under a gradient that never changes, each step of Adam is as long as its learning rate."""
    x, seen = torch.zeros((), dtype=torch.float64, requires_grad=True), []

    def loss():
        seen.append(float(x.detach()))
        return x * 3

    minimise(loss, [x], steps=8, lr=0.5)
    taken = [before - after for before, after in pairwise([*seen, float(x.detach())])]
    assert taken == pytest.approx([0.25 * (1 + math.cos(math.pi * step / 8)) for step in range(8)], rel=1e-6)


def test_tuning_that_does_not_help_is_dropped(dense):
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    distillation = distillation_of(dense, images, batch_size=4)
    perfect = copy.deepcopy(dense)
    model = tuned(perfect, dense, distillation, steps=3, lr=1e-2)
    found = Recovery.of(perfect, model, distillation)
    assert found.model is perfect
    assert found.after > found.before


def test_the_teacher_runs_on_the_varied_images(dense):
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    distillation, seen = distillation_of(dense, images, batch_size=4), []
    for number in range(4):
        assert float(distillation.varied_loss(dense, dense, generator(number))) == pytest.approx(0, abs=1e-6)
    other = copy.deepcopy(dense)
    other.head.weight.zero_()
    hook = other.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    loss = float(distillation.varied_loss(other, dense, generator(0)))
    hook.remove()
    assert not any(torch.equal(seen[0], known) for known in (images, images.flip(-1)))
    assert loss == pytest.approx(
        float(distillation.preserved.divergence(other(seen[0]), dense(seen[0]))), rel=1e-5
    )


def test_labels_are_not_those_of_mixed_images(dense):
    images = torch.randn(4, 3, 16, 16)
    distillation = Distillation(
        images,
        dense(images),
        torch.zeros(4, dtype=torch.long),
        SearchOptions(batch_size=4, label_weight=1.0),
    )
    assert float(distillation.varied_loss(dense, dense, generator(0))) == pytest.approx(0, abs=1e-6)


def test_a_variation_is_made_of_the_images_of_its_batch():
    # Image k is 10 k everywhere but for a column at its left, 1 more: so all that was done shows.
    images = (10.0 * torch.arange(6.0)).view(6, 1, 1, 1).repeat(1, 3, 8, 8)
    images[..., 0] += 1
    known = {10.0 * k + more for k in range(6) for more in (0, 1)}
    kinds = set()
    for seed in range(40):
        found = varied(images, generator(seed))
        assert found.shape == images.shape
        assert torch.equal(found, varied(images, generator(seed)))
        values = set(found.flatten().tolist())
        kinds.add("patched" if values <= known else "blended")
        if values <= known:
            borders = found[:, 0, :, [0, -1]] % 10
            assert set(borders.flatten().tolist()) <= {0.0, 1.0}
            inside = found[:, 0, :, 1:-1]
            assert all(set(image.flatten().tolist()) <= {10.0 * k for k in range(6)} for image in inside)
            assert all(len(set(image.flatten().tolist())) <= 2 for image in inside)
        else:
            assert float(found.min()) >= 0
            assert float(found.max()) <= 51
    assert kinds == {"patched", "blended"}
    left = torch.stack([varied(images, generator(seed))[:, 0, 0, 0] % 10 == 1 for seed in range(40)])
    assert 0.1 < float(left.float().mean()) < 0.9  # mirrored or not


def test_training_ends_at_a_loss_that_is_not_finite():
    x, losses = torch.zeros((), requires_grad=True), iter((1.0, 1.0, math.inf))
    reporter = Recorder()
    minimise(lambda: x * next(losses), [x], steps=8, lr=0.5, reporter=reporter)
    assert reporter.steps == [(1, 8), (2, 8)]
    assert x.isfinite()


@pytest.mark.parametrize("kind", ["all weights", "channel scales"])
def test_training_that_diverges_is_left_out(dense, kind):
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    slim, distillation = damaged(dense), distillation_of(dense, images, batch_size=4)
    if kind == "all weights":
        model = tuned(slim, dense, distillation, steps=3, lr=1e30)
    else:
        model = with_trained_scales(slim, find_prunable_layers(slim), distillation, steps=3, lr=1e36)
    found = Recovery.of(slim, model, distillation)
    assert found.model is slim
    assert math.isnan(found.after)
