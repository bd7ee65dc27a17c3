"""Tuning all weights of a slim model with the dense one as teacher."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from mhacut.distillation import Distillation
from mhacut.errors import MhacutError
from mhacut.tuning import tune


@pytest.fixture
def dense():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=1, embed_dim=24, num_heads=2, num_classes=5
    )
    torch.nn.init.normal_(model.head.weight)
    return model.eval().requires_grad_(False)


def lesson_of(dense, images) -> Distillation:
    teacher = dense(images)
    return Distillation(
        images, teacher, None, batch_size=4, seed=0, label_weight=0.0, classifier=True, amp=False
    )


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
    lesson, judge = lesson_of(dense, images[16:]), lesson_of(dense, images[:16])
    losses = []
    tuned = tune(slim, dense, lesson, judge, steps=30, lr=1e-3, progress=lambda *told: losses.append(told[2]))
    assert len(losses) == 30
    assert tuned.after < 0.7 * tuned.before
    assert tuned.after == pytest.approx(judge.divergence_of(tuned.model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in slim.state_dict().items())
    assert not any(parameter.requires_grad for parameter in tuned.model.parameters())


def test_tuning_that_does_not_help_is_dropped(dense):
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    lesson = lesson_of(dense, images)
    perfect = copy.deepcopy(dense)
    tuned = tune(perfect, dense, lesson, lesson, steps=3, lr=1e-2)
    assert tuned.model is perfect
    assert tuned.after > tuned.before


def test_the_mirrored_image_has_the_teachers_answer_to_it(dense):
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    lesson = lesson_of(dense, images)
    assert float(lesson.taught(dense, dense, mirrored=True)) == pytest.approx(0, abs=1e-6)
    assert float(lesson.taught(dense, dense, mirrored=False)) == pytest.approx(0, abs=1e-6)
    other = copy.deepcopy(dense)
    other.head.weight.zero_()
    plain, mirrored = (float(lesson.taught(other, dense, mirrored=flip)) for flip in (False, True))
    expected = lesson.divergence(other(images.flip(-1)), dense(images.flip(-1)))
    assert mirrored == pytest.approx(float(expected), rel=1e-5)
    assert mirrored != pytest.approx(plain, rel=1e-3)


def test_a_loss_that_is_not_finite_is_refused(dense):
    lesson = lesson_of(dense, torch.randn(4, 3, 16, 16))
    dense.head.bias += float("nan")
    with pytest.raises(MhacutError, match="not finite"):
        lesson.taught(dense, dense, mirrored=False)
